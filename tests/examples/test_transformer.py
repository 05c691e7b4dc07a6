import itertools

import pytest
import torch
from generation import beam_search, generate
from tolerance import assert_derived_close
from torch.nn import functional as F
from transformer import Config, Transformer

import manyheads as mh

VOCABULARY = 17
CONFIGS = [
    Config(dim=12, heads=2, hidden=19, dropout=0.0, norm=norm, positions=positions)
    for norm, positions in itertools.product(("pre", "post"), ("rotary", "sinusoidal"))
]
KINDS = {"encoder": (2, 0), "decoder": (0, 2), "both": (2, 3)}


def make(config=CONFIGS[0], kind="decoder"):
    return Transformer(VOCABULARY, config, *KINDS[kind]).eval()


def tokens(*shape):
    return torch.randint(1, VOCABULARY, shape)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.norm}-{c.positions}")
def test_stock_attention_is_the_same_model(config, kind):
    ours = make(config, kind)
    stock = make(Config(**{**vars(config), "attention": "sdpa"}), kind)
    stock.load_state_dict(ours.state_dict())
    inputs = (tokens(3, 7), tokens(3, 5) if kind == "both" else None)
    lengths = None if kind == "decoder" else torch.tensor([7, 4, 1])
    got, expected = ours(*inputs, lengths=lengths), stock(*inputs, lengths=lengths)
    real = slice(None) if kind != "encoder" else torch.arange(7) < lengths[:, None]
    assert_derived_close(got[real], expected[real])


@pytest.mark.parametrize("attention", ["manyheads", "sdpa"])
@pytest.mark.parametrize("kind", ["decoder", "both"])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.norm}-{c.positions}")
def test_decoding_with_caches_is_decoding_without(config, kind, attention):
    model = make(Config(**{**vars(config), "attention": attention, "kv_heads": 1}), kind)
    target, memory, lengths = tokens(3, 11), None, None
    with torch.no_grad():
        if kind == "both":
            lengths = torch.tensor([7, 2, 5])
            memory = model.encode(tokens(3, 7), lengths)
        whole = model.decode(target, memory, lengths)
        caches = model.caches()
        steps = [
            model.decode(part, memory, lengths, caches=caches)
            for part in target.split([5, 1, 1, 4], 1)
        ]
    assert_derived_close(torch.cat(steps, 1), whole)
    assert [cross.length for _, cross in caches] == [7 if kind == "both" else 0] * len(caches)


def test_padding_changes_nothing():
    model = make(kind="both")
    source, target = tokens(2, 7), tokens(2, 5)
    padded = model(source, target, torch.tensor([7, 3]))
    assert_derived_close(padded[1:], model(source[1:, :3], target[1:]))


@pytest.mark.parametrize("attention", ["manyheads", "sdpa"])
def test_packed_documents_do_not_see_each_other(attention):
    model = make(Config(**{**vars(CONFIGS[0]), "attention": attention}))
    first, second = tokens(1, 5), tokens(1, 7)
    packed = model(torch.cat([first, second], 1), mask=mh.Documents([5, 7]))
    assert_derived_close(packed, torch.cat([model(first), model(second)], 1))


def test_copying_is_the_formula():
    torch.manual_seed(3)
    model = make(Config(**{**vars(CONFIGS[0]), "copies": True}), kind="both")
    source, target, lengths = tokens(3, 7), tokens(3, 5), torch.tensor([7, 4, 1])
    memory = model.encode(source, lengths)
    hidden = model.decode(target, memory, lengths)
    shares = (hidden @ model.embedding.weight.T).softmax(-1)
    for text, length in enumerate(lengths):
        queries = model.copying.query(hidden[text])
        looked = (queries @ memory[text, :length].T / 12**0.5).softmax(-1)
        copied = looked @ F.one_hot(source[text, :length], VOCABULARY).float()
        writes = model.copying.writes(hidden[text]).sigmoid()
        shares[text] = writes * shares[text] + (1 - writes) * copied
    got = model(source, target, lengths)
    assert_derived_close(got, shares.log())
    assert_derived_close(got.exp().sum(-1), torch.ones(3, 5))


@pytest.mark.parametrize("beams", [1, 3])
def test_copying_sees_its_own_source_while_writing(beams):
    model = make(Config(**{**vars(CONFIGS[0]), "copies": True}), kind="both")
    model.copying.writes.bias.data -= 9  # copies only
    source, lengths, prompt = tokens(2, 7), torch.tensor([7, 3]), tokens(2, 1)
    with torch.no_grad():
        memory = model.encode(source, lengths)
    given = {"memory": memory, "memory_lengths": lengths, "source": source, "end": 0}
    search = {"beams": beams} if beams > 1 else {}
    written = (beam_search if beams > 1 else generate)(model, prompt, 5, **given, **search)
    for text, length in enumerate(lengths):
        assert set(written[text].tolist()) <= set(source[text, :length].tolist())
    if beams == 1:
        whole = model(source, torch.cat([prompt, written], 1), lengths)
        assert torch.equal(whole.argmax(-1)[:, :5], written)


def test_the_future_is_hidden():
    model, text = make(kind="decoder"), tokens(1, 7)
    changed = text.clone()
    changed[0, 4] += 1
    before, after = model(text), model(changed % VOCABULARY)
    assert torch.equal(before[:, :4], after[:, :4])
    assert not torch.equal(before[:, 4:], after[:, 4:])


def test_greedy_takes_the_likeliest_and_stops_at_the_end():
    model, prompt = make(), tokens(3, 5)
    written, text = [], prompt
    for _ in range(6):
        written.append(model(text)[:, -1].argmax(-1))
        text = torch.cat([text, written[-1][:, None]], 1)
    expected = torch.stack(written, 1)
    assert torch.equal(generate(model, prompt, 6), expected)
    end = int(expected[0, 2])
    stopped = generate(model, prompt, 6, end=end)[0]
    first = stopped.tolist().index(end)
    assert stopped[:first].tolist() == expected[0, :first].tolist()
    assert (stopped[first:] == end).all()


def test_drawn_tokens_follow_the_shares_and_the_generator():
    model, prompt = make(), tokens(1, 5)
    shares = (model(prompt)[0, -1].detach() / 0.7).softmax(-1)
    prompts = prompt.expand(4000, -1)
    drawn = generate(model, prompts, 1, temperature=0.7, generator=torch.Generator().manual_seed(5))
    counts = torch.bincount(drawn[:, 0], minlength=VOCABULARY) / len(prompts)
    assert (counts - shares).abs().max() < 0.04  # five deviations of the worst case
    again = generate(model, prompts, 1, temperature=0.7, generator=torch.Generator().manual_seed(5))
    assert torch.equal(drawn, again)
    likeliest = set(shares.topk(3).indices.tolist())
    assert set(generate(model, prompts, 1, temperature=0.7, top_k=3)[:, 0].tolist()) == likeliest
    few = set(
        generate(model, prompts, 1, temperature=0.7, top_p=float(shares.max()))[:, 0].tolist()
    )
    assert few == {int(shares.argmax())}


def test_one_beam_is_greedy():
    model = make(kind="both")
    lengths = torch.tensor([7, 3])
    with torch.no_grad():
        memory = model.encode(tokens(2, 7), lengths)
    prompt = tokens(2, 1)
    options = {"memory": memory, "memory_lengths": lengths, "end": 0}
    searched = beam_search(model, prompt, 5, beams=1, **options)
    assert torch.equal(searched, generate(model, prompt, 5, **options))


def searched_without_caches(model, prompt, new_tokens, end, beams, length_penalty):
    """Beam search as its definition says, all of every text read anew in every step."""

    def rank(text, score):
        return score / ((5 + len(text)) / 6) ** length_penalty

    found = [((), 0.0)]
    for _ in range(new_tokens):
        longer = [one for one in found if one[0][-1:] == (end,)]
        for text, score in (one for one in found if one[0][-1:] != (end,)):
            steps = model(torch.tensor([[*prompt.tolist(), *text]]))[0, -1].log_softmax(-1)
            longer += [((*text, t), score + float(step)) for t, step in enumerate(steps)]
        found = sorted(longer, key=lambda one: -rank(*one))[:beams]
    return list(found[0][0])


@pytest.mark.parametrize("length_penalty", [0.0, 2.0])
def test_few_beams_are_those_of_the_definition(length_penalty):
    lengths = set()
    for seed in range(6):
        torch.manual_seed(seed)
        model, prompts = make().requires_grad_(False), tokens(3, 5)
        for weight in model.parameters():
            weight *= 2.5  # so that what was written matters
        end = int(model(prompts)[0, -1].topk(3).indices[-1])  # likely, and not the likeliest
        searched = beam_search(model, prompts, 7, end, beams=3, length_penalty=length_penalty)
        for prompt, text in zip(prompts, searched.tolist(), strict=True):
            expected = searched_without_caches(model, prompt, 7, end, 3, length_penalty)
            assert text[: len(expected)] == expected and set(text[len(expected) :]) <= {end}
            lengths.add(len(expected))
    assert len(lengths) > 2


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("length_penalty", [0.0, 0.6])
def test_enough_beams_find_the_best_of_all_texts(length_penalty, seed):
    torch.manual_seed(seed)
    model, prompt = Transformer(5, CONFIGS[0], 0, 2).eval(), torch.tensor([[1, 3], [2, 2]])
    for weight in model.parameters():
        weight.data *= 2  # so that what was written matters
    end = int(model(prompt)[0, -1].argmax())  # so that the best of the first text ends early

    def rank(row, text):
        steps = (
            model(torch.cat([prompt[row], torch.tensor(text)])[None]).log_softmax(-1)[0].detach()
        )
        total = sum(float(steps[len(prompt[row]) - 1 + i, t]) for i, t in enumerate(text))
        return total / ((5 + len(text)) / 6) ** length_penalty

    texts = {
        (*text, end) if len(text) < 3 else text
        for n in range(4)
        for text in itertools.product(range(5), repeat=n)
        if end not in text[:-1] and not (len(text) < 3 and end in text)
    }
    found = beam_search(model, prompt, 3, end, beams=125, length_penalty=length_penalty)
    for row in range(2):
        best = max(texts, key=lambda text: rank(row, text))
        assert found[row].tolist() == [*best, *[end] * (3 - len(best))]
