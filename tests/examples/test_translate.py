"""The Marian example on a tiny random model: the file, the network, the search, the texts."""

import itertools
import math
import struct
from pathlib import Path

import marian
import marian_file
import numpy as np
import pytest
import sentencepiece
import torch
import translate
import yaml

import manyheads as mh

SIZE, HEADS, INNER, VOCABULARY = 14, 2, 11, 23
SETTINGS = marian_file.EXPECTED | {
    "dim-emb": SIZE,
    "transformer-heads": HEADS,
    "transformer-dim-ffn": INNER,
    "dim-vocabs": [VOCABULARY, VOCABULARY],
    "enc-depth": 2,
    "dec-depth": 3,
}
SOURCES = [[5, 7, 2, 19, 11, 0], [3, 0], [13, 17, 22, 0]]


def random_weights(
    seed: int, vocabulary: int = VOCABULARY, end: float = 0.2
) -> dict[str, np.ndarray]:
    """Marian's names, Marian's shapes: matrices [inputs, outputs], vectors [1, n]."""
    random = np.random.default_rng(seed)
    settings = SETTINGS | {"dim-vocabs": [vocabulary, vocabulary]}
    weights = {}
    for ours, parameter in marian.Marian(settings).named_parameters():
        name, shape = marian_file.marian_name(ours), tuple(parameter.shape)
        shape = (1, *shape) if len(shape) == 1 else shape if name == "Wemb" else shape[::-1]
        value = random.normal(0, 0.1 if shape[0] == 1 else 0.5, shape)
        weights[name] = (value + name.endswith("_ln_scale")).astype(np.float32)
    # Rows of one length and a strong recurrence: texts that do not repeat one token for ever.
    weights["Wemb"] /= np.linalg.norm(weights["Wemb"], axis=1, keepdims=True)
    weights["decoder_ff_logit_out_b"][0, marian.EOS] = end  # how likely texts end
    return {k: v * np.float32(4) if k.endswith("_rnn_W") else v for k, v in weights.items()}


def write(path: Path, weights, settings=SETTINGS, quantised=()) -> Path:
    """A Marian binary; names in `quantised` as int8 with multiplier 50."""
    items = [
        ("special:model.yml", 0x101, (len(yaml.dump(settings)),), yaml.dump(settings).encode())
    ]
    for name, value in weights.items():
        if name in quantised:
            value = np.clip(np.round(value * 50), -127, 127).astype(np.int8)
            stored = value if name == "Wemb" else value.T
            raw = stored.tobytes() + struct.pack("<f", 50.0)
            items.append((name, 0x4101, value.shape, raw + bytes(-len(raw) % 256)))
        else:
            items.append((name, 0x404, value.shape, value.tobytes()))
    names = [name.encode() + b"\0" for name, *_ in items]
    data = struct.pack("<QQ", 1, len(items))
    for name, (_, kind, shape, raw) in zip(names, items, strict=True):
        data += struct.pack("<4Q", len(name), kind, len(shape), len(raw))
    data += b"".join(names)
    data += b"".join(struct.pack(f"<{len(shape)}i", *shape) for _, _, shape, _ in items)
    data += struct.pack("<Q", 24) + bytes(24) + b"".join(raw for *_, raw in items)
    path.write_bytes(data)
    return path


class Oracle:
    """The same network from Marian's formulas, one sentence and one token at a time, float64."""

    def __init__(self, weights) -> None:
        self.weights = {name: value.astype(np.float64) for name, value in weights.items()}

    def __getitem__(self, name):
        return self.weights[name]

    def norm(self, x, name):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-9)
        return x * self[name + "_ln_scale"] + self[name + "_ln_bias"]

    def attend(self, x, memory, layer):
        parts = [
            np.split(of @ self[f"{layer}_W{name}"] + self[f"{layer}_b{name}"], HEADS, axis=1)
            for name, of in (("q", x), ("k", memory), ("v", memory))
        ]
        heads = []
        for q, k, v in zip(*parts, strict=True):
            weights = np.exp(q @ k.T / math.sqrt(SIZE / HEADS))
            heads.append(weights / weights.sum(1, keepdims=True) @ v)
        out = np.concatenate(heads, axis=1) @ self[f"{layer}_Wo"] + self[f"{layer}_bo"]
        return self.norm(x + out, f"{layer}_Wo")

    def feed_forward(self, x, layer):
        inner = np.maximum(x @ self[f"{layer}_W1"] + self[f"{layer}_b1"], 0)
        return self.norm(x + inner @ self[f"{layer}_W2"] + self[f"{layer}_b2"], f"{layer}_ffn")

    def place(self, at):
        rates = np.exp(-np.arange(SIZE // 2) * math.log(10000) / (SIZE // 2 - 1))
        return np.concatenate([np.sin(at * rates), np.cos(at * rates)])[None]

    def chances(self, source, target):
        """Log-probabilities [len(target) + 1, vocabulary] of every next token."""
        embed = self["Wemb"] * math.sqrt(SIZE)
        memory = np.concatenate([embed[t] + self.place(i) for i, t in enumerate(source)])
        for layer in ("encoder_l1", "encoder_l2"):
            memory = self.feed_forward(self.attend(memory, memory, f"{layer}_self"), f"{layer}_ffn")
        layers = ("decoder_l1", "decoder_l2", "decoder_l3")
        cells = dict.fromkeys(layers, 0.0)
        rows = []
        for i, x in enumerate([np.zeros((1, SIZE)), *(embed[[t]] for t in target)]):
            x = x + self.place(i)
            for layer in layers:
                forget = 1 / (1 + np.exp(-(x @ self[f"{layer}_rnn_Wf"] + self[f"{layer}_rnn_bf"])))
                cells[layer] = forget * cells[layer] + (1 - forget) * (x @ self[f"{layer}_rnn_W"])
                x = self.norm(np.maximum(cells[layer], 0) + x, f"{layer}_rnn_ffn")
                x = self.feed_forward(self.attend(x, memory, f"{layer}_context"), f"{layer}_ffn")
            logits = (x @ self["Wemb"].T + self["decoder_ff_logit_out_b"])[0]
            rows.append(logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max())
        return np.stack(rows)


@pytest.mark.parametrize("attention", ["manyheads", "sdpa"])
def test_greedy_tokens_are_the_formulas(tmp_path, attention):
    lengths, tokens = set(), set()
    for seed in range(2, 5):
        weights = random_weights(seed)
        oracle = Oracle(weights)
        model = marian.load(write(tmp_path / "model.bin", weights), attention)
        for source, found in zip(SOURCES, marian.search(model, SOURCES, 1, 1.5), strict=True):
            expected = []
            while len(expected) <= int(1.5 * len(source)):
                token = int(oracle.chances(source, expected)[-1].argmax())
                if token == marian.EOS:
                    break
                expected.append(token)
            assert found == expected
            lengths.add(len(found))
            tokens.update(found)
    assert len(lengths) > 4 and len(tokens) > 4


def test_wide_search_finds_the_best_of_all(tmp_path):
    weights = random_weights(0, vocabulary=4, end=0.0)
    settings = SETTINGS | {"dim-vocabs": [4, 4]}
    model = marian.load(write(tmp_path / "model.bin", weights, settings))
    oracle = Oracle(weights)
    sources, found_greedily = [[1, 3, 0], [2, 2, 0], [3, 1, 0], [1, 0, 0]], 0
    for source, found in zip(sources, marian.search(model, sources, 109, 1.0), strict=True):
        worth = {}
        for length in range(4):
            for text in itertools.product((1, 2, 3), repeat=length):
                chances = oracle.chances(source, text)
                steps = chances[range(length + 1), [*text, marian.EOS]]
                worth[text] = steps.sum() / (length + 1)
        assert tuple(found) == max(worth, key=worth.get)
        found_greedily += marian.search(model, [source], 1, 1.0)[0] == found
    assert found_greedily < len(sources)  # the wide search was needed


def test_int8_weights_are_read_as_their_quotients(tmp_path):
    weights = random_weights(0)
    quantised = [name for name in weights if name == "Wemb" or name.endswith(("Wq", "W1", "Wf"))]
    assert len(quantised) == 1 + 5 + 5 + 3
    _, found = marian_file.read(write(tmp_path / "model.bin", weights, quantised=quantised))
    assert found.keys() == weights.keys()
    for name, value in weights.items():
        if name in quantised:
            value = np.round(np.clip(value * np.float32(50), -127, 127)) / np.float32(50)
        expected = value if name == "Wemb" or len(value) == 1 else value.T
        assert np.array_equal(found[name].numpy(), expected), name


def test_damaged_files_say_so(tmp_path):
    path = write(tmp_path / "model.bin", random_weights(0))
    whole = path.read_bytes()
    for length in (0, 7, 15, 100, 4000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(mh.ArgumentError, match=f"no whole Marian binary.*{length} bytes"):
            marian.load(path)
    path.write_bytes(struct.pack("<Q", 2) + whole[8:])
    with pytest.raises(mh.ArgumentError, match="version 2"):
        marian.load(path)


def test_other_models_are_refused(tmp_path):
    weights = random_weights(0)
    other = SETTINGS | {"transformer-decoder-autoreg": "self-attention"}
    with pytest.raises(mh.ArgumentError, match="got transformer-decoder-autoreg='self-attention'"):
        marian.load(write(tmp_path / "model.bin", weights, other))
    without = {key: value for key, value in SETTINGS.items() if key != "dim-emb"}
    with pytest.raises(mh.ArgumentError, match="no dim-emb"):
        marian.load(write(tmp_path / "model.bin", weights, without))
    del weights["decoder_l3_context_bk"]
    with pytest.raises(mh.ArgumentError, match=r"got none for decoder_l3_context_bk; .*\(14,\)"):
        marian.load(write(tmp_path / "model.bin", weights))


@pytest.fixture
def folder(tmp_path):
    """A model of one's own: a random network and pieces learnt from a few words."""
    words = tmp_path / "words.txt"
    words.write_text(
        "a red bird sang\nthe red boat sank\na bird in the boat\nmud and fog by mid day\n" * 9
    )
    sentencepiece.SentencePieceTrainer.train(
        input=str(words), model_prefix=str(tmp_path / "vocab"), vocab_size=VOCABULARY,
        eos_id=0, unk_id=1, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    (tmp_path / "vocab.model").rename(tmp_path / "vocab.spm")
    write(tmp_path / "model.tiny.bin", random_weights(3))
    return tmp_path


def test_a_folder_of_ones_own_keeps_lines(folder):
    translator = translate.Translator(folder=folder)
    text = "A red bird. The boat sank!\n\nthe bird"
    parts = ["A red bird.", "The boat sank!", "", "the bird"]
    alone = [translator.sentences([part], 2)[0] for part in parts]
    assert translator(text, 2) == f"{alone[0]} {alone[1]}\n{alone[2]}\n{alone[3]}"
    assert len(set(alone)) > 2


def test_alignment_is_each_steps_weights(folder):
    source, target, weights = translate.alignment(translate.Translator(folder=folder), "red boat")
    assert source[-1] == "</s>" and weights.shape == (len(target), len(source))
    assert torch.equal(weights.sum(1).round(decimals=5), torch.ones(len(target)))


def test_a_folder_without_a_model_says_what_it_holds(folder):
    (folder / "model.tiny.bin").rename(folder / "model.tiny.old")
    with pytest.raises(mh.ArgumentError, match=r"holds 0 files .*model\.tiny\.old"):
        translate.Translator(folder=folder)


def test_damaged_pieces_say_so(folder):
    path = folder / "vocab.spm"
    path.write_bytes(path.read_bytes()[:99])
    with pytest.raises(mh.ArgumentError, match=r"vocab\.spm is no whole SentencePiece model"):
        translate.Translator(folder=folder)


def test_measures_compare_with_stock_attention(folder, monkeypatch):
    sample = [("a red bird", "um"), ("the boat", "dois")]
    monkeypatch.setattr(translate, "django_sample", lambda: sample)
    own = translate.Translator
    monkeypatch.setattr(translate, "Translator", lambda attention: own(None, folder, attention))
    found = translate.measures(beams=3)
    assert found["sentences"] == 2 and found["greedy tokens equal"] is True
    assert found["beam 3, sdpa"].keys() == {"BLEU", "chrF", "CPU seconds"}
