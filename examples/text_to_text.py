"""A small encoder-decoder that learns to turn one text into another: translation, summaries.

    task = TextToText(learn_tokens(texts, 8000), Config(dim=256))
    task.fit(pairs, Settings(steps=2000), batch_size=64, folder=Path("mine"))
    task.write(["some text"], beams=4)

B texts; Ls and Lt tokens of the longest source and target among them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from batches import Order, even_rows
from checkpoints import digest
from generation import beam_search, generate
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from training import Row, Settings, load_weights, train
from transformer import Config, Transformer

import manyheads as mh

Pair = tuple[str, str]

START, END, PADDING = 0, 1, 2


def learn_tokens(texts: Iterable[str], size: int) -> Tokenizer:
    """Byte-level byte pairs (Sennrich et al., 2016): any text can be written, none is unknown."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<start>", "<end>", "<padding>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


class TextToText:
    """A tokenizer and a `Transformer` with two layers stacks, which writes texts from texts.

    source_tokens, target_tokens: what is longer is cut; when training, such targets are left out.
    source_end: how many of the source tokens are its last ones, where it is cut.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        config: Config,
        layers: tuple[int, int] = (3, 3),
        source_tokens: int = 128,
        target_tokens: int = 128,
        source_end: int = 0,
    ) -> None:
        self.tokenizer, self.source_end = tokenizer, source_end
        self.source_tokens, self.target_tokens = source_tokens, target_tokens
        self.model = Transformer(tokenizer.get_vocab_size(), config, *layers)

    @classmethod
    def load(cls, folder: Path, config: Config, **sizes: object) -> TextToText:
        """What `fit` left in a folder; sizes as it was made with.

        Raises: FileNotFoundError, CheckpointError.
        """
        path = folder / "tokenizer.json"
        if not path.exists():
            raise FileNotFoundError(
                f"no trained model in {folder}: got no tokenizer.json; expected a folder that a "
                "training has filled. Train first (--train), or give another folder."
            )
        task = cls(Tokenizer.from_file(str(path)), config, **sizes)
        load_weights(folder / "checkpoint.safetensors", task.model)
        task.model.eval()
        return task

    def fit(
        self,
        pairs: Sequence[Pair],
        settings: Settings,
        batch_size: int,
        folder: Path | None = None,
        smoothing: float = 0.1,
    ) -> list[Row]:
        """Train on (source, target) pairs with label smoothing; the rows of the log."""
        sources = self.source([source for source, _ in pairs])
        encoded = self.tokenizer.encode_batch([target for _, target in pairs])
        targets = [torch.tensor([START, *target.ids, END]) for target in encoded]
        kept = [i for i, target in enumerate(targets) if len(target) <= self.target_tokens + 2]
        sources, targets = [sources[i] for i in kept], [targets[i] for i in kept]
        lengths = [len(s) + len(t) for s, t in zip(sources, targets, strict=True)]

        def loss(rows: Tensor) -> Tensor:
            source, source_lengths = padded([sources[i] for i in rows])
            target, target_lengths = padded([targets[i] for i in rows])
            memory = self.model.encode(source, source_lengths)
            hidden = self.model.decode(target[:, :-1], memory, source_lengths)
            real = torch.arange(hidden.shape[1]) < target_lengths[:, None] - 1
            if self.model.copying is None:  # logits are the dearest part: then none of padding
                logits = self.model.logits(even_rows(hidden[real]))[: real.sum()]
            else:
                logits = self.model.logits(hidden, memory, source_lengths, source)[real]
            return F.cross_entropy(logits.float(), target[:, 1:][real], label_smoothing=smoothing)

        order = Order(len(kept), batch_size, settings.seed, lengths)
        tokens = self.tokenizer.to_str()
        rows = [*sources, *targets]
        cuts = torch.tensor([len(row) for row in rows])
        data = digest({"rows": torch.cat(rows), "cuts": cuts}, tokens)
        beside = {"tokenizer.json": tokens.encode()}
        return train(self.model, order, loss, settings, folder, data=data, beside=beside)

    def write(
        self, texts: Sequence[str], beams: int = 1, length_penalty: float = 0.6, batch: int = 32
    ) -> list[str]:
        """What the model makes of each text; one beam is greedy. See `beam_search`."""
        sources = self.source(texts)
        order = sorted(range(len(texts)), key=lambda i: len(sources[i]))
        found: dict[int, str] = {}
        for at in range(0, len(order), batch):
            chosen = order[at : at + batch]
            tokens, lengths = padded([sources[i] for i in chosen])
            start = torch.full((len(chosen), 1), START)
            with torch.inference_mode():
                memory = self.model.encode(tokens, lengths)
            search = {"beams": beams, "length_penalty": length_penalty} if beams > 1 else {}
            method = beam_search if beams > 1 else generate
            written = method(
                self.model, start, self.target_tokens, END,
                memory=memory, memory_lengths=lengths, source=tokens, **search,
            )  # fmt: skip
            texts_written = self.tokenizer.decode_batch(written.tolist(), skip_special_tokens=True)
            found |= zip(chosen, (text.strip() for text in texts_written), strict=True)
        return [found[i] for i in range(len(texts))]

    def source(self, texts: Sequence[str]) -> list[Tensor]:
        """Int [L] of each text, its END included; of a long one the beginning and the end."""
        first = self.source_tokens - self.source_end
        rows = [torch.tensor([*text.ids, END]) for text in self.tokenizer.encode_batch(list(texts))]
        return [
            row
            if len(row) <= self.source_tokens
            else torch.cat([row[:first], row[len(row) - self.source_end :]])
            for row in rows
        ]

    def alignment(self, text: str) -> tuple[list[str], list[str], Tensor]:
        """(source tokens, written tokens, weights [written, source]) of the last cross-attention.

        What was written is read once more, in one call, whose every row `mh.observe` keeps; heads
        are averaged. A row belongs to the token that was written from it.
        """
        source, lengths = padded(self.source([text]))
        written = [START, *self.tokenizer.encode(self.write([text])[0]).ids]
        rows = mh.WeightRows(tuple(range(len(written))))
        layer = f"decoder.layers.{len(self.model.decoder.layers) - 1}.look"
        with mh.observe(self.model, rows, layers=layer) as seen, torch.inference_mode():
            self.model(source, torch.tensor([written]), lengths)
        (record,) = seen[layer]
        pieces = [
            [self.tokenizer.decode([token]) or "</s>" for token in tokens]
            for tokens in (source[0].tolist(), [*written[1:], END])
        ]
        return pieces[0], pieces[1], record[rows].mean(1)[0]


def padded(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(int [B, L], the rows one below the other; int [B], their lengths)."""
    lengths = torch.tensor([len(row) for row in rows])
    return pad_sequence(list(rows), batch_first=True, padding_value=PADDING), lengths


def without_near_copies(
    held_out: Sequence[Pair], known: Sequence[Pair], most: float = 0.7
) -> list[Pair]:
    """The pairs whose source shares less than `most` of its words with every known source.

    Shared means |a & b| / |a | b| of the sets of words, digits left out: texts that differ by a
    version number or one word of ten are copies, and a model could answer them from memory.
    """
    from sklearn.feature_extraction.text import CountVectorizer  # slow: imported if used

    counter = CountVectorizer(binary=True, token_pattern=r"[^\W\d_]+")
    sources = [source for part in (known, held_out) for source, _ in part]
    words = counter.fit_transform(sources).astype("float32")
    sizes = words.getnnz(axis=1)
    kept: list[Pair] = []
    for at in range(0, len(held_out), 256):  # a matrix of all at once would take gigabytes
        rows = range(at, min(at + 256, len(held_out)))
        place = [len(known) + i for i in rows]
        shared = (words[place] @ words[: len(known)].T).toarray()
        either = sizes[place][:, None] + sizes[: len(known)] - shared
        copied = (shared / either.clip(1)).max(axis=1) >= most
        kept += [held_out[i] for i, copy in zip(rows, copied, strict=True) if not copy]
    return kept
