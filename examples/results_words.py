"""What was found of each part of the examples, in Markdown, for results.py."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import mean
from typing import Any

from tabulate import tabulate

Found = Mapping[str, Any]


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; numbers are given as they shall be read."""
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    return tabulate(cells, header, tablefmt="pipe", disable_numparse=True)


def goal(met: bool, text: str) -> str:
    """A goal beside what was measured."""
    return f"- {'Met' if met else '**Missed**'}: {text}"


def joined(*blocks: str) -> str:
    """Paragraphs."""
    return "\n\n".join(blocks)


def duration(seconds: float) -> str:
    """For people.

    >>> duration(12.345), duration(125)
    ('12.3 s', '2.1 min')
    """
    return f"{seconds:.1f} s" if seconds < 100 else f"{seconds / 60:.1f} min"


def packaged_translation(found: Found) -> str:
    """BLEU, chrF, time: greedy and by beam search, on both attentions."""
    measures = found["measures"]
    ways = {name: row for name, row in measures.items() if isinstance(row, dict)}
    rows = [
        (
            name.replace("sdpa", "PyTorch's attention"),
            f"{row['BLEU']:.1f}",
            f"{row['chrF']:.1f}",
            f"{row['CPU seconds']:.1f}",
        )
        for name, row in ways.items()
    ]
    greedy = ways["greedy, manyheads"]
    return joined(
        f"{measures['sentences']} strings of Django's Brazilian catalogues.",
        goal(
            greedy["BLEU"] >= 47 and greedy["chrF"] >= 70,
            f"greedy, {greedy['BLEU']:.1f} BLEU and {greedy['chrF']:.1f} chrF "
            "(goal: at least 47 and 70)",
        )
        + "\n"
        + goal(measures["greedy tokens equal"], "greedy tokens equal to those of PyTorch's"),
        table(["", "BLEU", "chrF", "CPU seconds"], rows),
        table(["English", "written (greedy)", "reference"], found["samples"]),
    )


def trained_translation(found: Found) -> str:
    """BLEU and chrF, beside copying the source."""
    ways = {name: found[name] for name in ("trained", "greedy", "copying the source")}
    trained, baseline = found["trained"], found["copying the source"]
    names = {"trained": "trained, beam search", "greedy": "trained, greedy"}
    rows = [(names.get(n, n), f"{w['BLEU']:.1f}", f"{w['chrF']:.1f}") for n, w in ways.items()]
    return joined(
        f"{found['pairs']:,} pairs of Debian's translated descriptions to train on, "
        f"{found['held out']:,} held out, with no near copy among the others. Training took "
        f"{duration(found['training, CPU seconds'])} of CPU time.",
        goal(
            all(trained[unit] > baseline[unit] for unit in ("BLEU", "chrF")),
            f"{trained['BLEU']:.1f} BLEU and {trained['chrF']:.1f} chrF (goal: clearly above "
            f"copying the source, {baseline['BLEU']:.1f} and {baseline['chrF']:.1f})",
        ),
        table(["", "BLEU", "chrF"], rows),
        table(["English", "written", "reference"], found["examples"]),
    )


def summarisation(found: Found) -> str:
    """ROUGE-L, beside a text's first words and a prompted model."""
    scores = found["ROUGE-L"]
    baseline = max(score for name, score in scores.items() if name != "trained")
    columns = [name for name in found if name.startswith("ROUGE-L")]
    ways = dict.fromkeys(way for column in columns for way in found[column])
    rows = [
        (way, *(f"{found[column][way]:.1f}" if way in found[column] else "" for column in columns))
        for way in ways
    ]
    first = found["examples"][0]
    samples = [[sample[name] for name in first] for sample in found["examples"]]
    return joined(
        f"{found['pairs']:,} descriptions to train on, {found['held out']:,} held out, with no "
        f"near copy among the others. Training took {duration(found['training, CPU seconds'])} of "
        "CPU time.",
        goal(
            scores["trained"] > baseline,
            f"ROUGE-L {scores['trained']:.1f} (goal: clearly above the first words of a text, "
            f"{baseline:.1f})",
        ),
        table(["", *columns], rows),
        table(list(first), samples),
    )


def chat(found: Found) -> str:
    """A conversation, and whether stock attention says the same."""
    turns = zip(
        found["questions"], found["answers"], found["prompt_tokens"], found["prompt_tokens_run"],
        strict=True,
    )  # fmt: skip
    return joined(
        goal(
            found["same_tokens_as_sdpa"],
            f"{found['new_tokens']} greedy tokens in {len(found['questions'])} turns equal to those"
            " of PyTorch's attention and transformers' cache",
        ),
        f"CPU time {found['cpu_seconds']:.1f} s, PyTorch's {found['cpu_seconds_sdpa']:.1f} s: "
        f"{found['cpu_seconds'] / found['cpu_seconds_sdpa']:.2f} times. What a prompt shares with "
        "the turns before it is in the cache, and is not run again.",
        table(["question", "answer", "prompt tokens", "run"], turns),
    )


def perplexity(found: Found) -> str:
    """Perplexity, and how far stock attention is from it."""
    return joined(
        f"{found['tokens']:,} tokens of {found['text']}, in windows of {found['context']:,}.",
        goal(
            found["same_greedy_tokens"],
            f"{found['greedy_tokens']} greedy tokens, of four prompts, equal to those of PyTorch's",
        )
        + "\n"
        + goal(
            found["nats_difference"] < 1e-3,
            f"perplexity {found['perplexity']:.3f}, PyTorch's {found['perplexity_sdpa']:.3f}: "
            f"{found['nats_difference']:.1e} nats a token apart, at most "
            f"{found['largest_difference_of_a_token']:.1e} (goal: the same; here to 1e-3 nats)",
        ),
        f"CPU time {found['cpu_seconds']:.1f} s, PyTorch's {found['cpu_seconds_sdpa']:.1f} s: "
        f"{found['cpu_seconds'] / found['cpu_seconds_sdpa']:.2f} times.",
    )


def trained_language_model(found: Found) -> str:
    """Perplexity and bits per byte, beside a unigram model and xz."""
    rows = [
        (name, f"{found[f'perplexity{key}']:.1f}" if key != "_xz" else "", f"{bits:.2f}")
        for name, key in (("trained", ""), ("unigram", "_unigram"), ("xz -9", "_xz"))
        for bits in [found[f"bits_per_byte{key}"]]
    ]
    return joined(
        f"{found['parameters'] / 1e6:.1f} million weights, {found['steps']:,} steps on "
        f"{found['training_texts']:,} package descriptions, packed; {found['test_texts']:,} held "
        f"out. Training took {duration(found['seconds'])}.",
        goal(
            found["bits_per_byte"] < found["bits_per_byte_xz"],
            f"{found['bits_per_byte']:.2f} bits a byte (goal: less than both baselines)",
        ),
        table(["", "perplexity of a token", "bits per byte"], rows),
        "What it writes:",
        "\n".join(f"> {' '.join(sample.split())}\n>" for sample in found["samples"])[:-2],
    )


def compared(ours: list[float], stock: list[float], ratio: float, form: str, note: str) -> str:
    """The same training on two attentions, a column for each seed."""
    apart = abs(mean(ours) - mean(stock))
    spread = max(max(values) - min(values) for values in (ours, stock))
    rows = [
        (name, *(format(value, form) for value in values), format(mean(values), form))
        for name, values in (("manyheads", ours), ("PyTorch's attention", stock))
    ]
    return joined(
        goal(
            apart <= spread,
            f"the means of both are {format(apart, form)} apart (goal: no more than the seeds "
            f"of one, which are up to {format(spread, form)} apart)",
        ),
        f"CPU time of a training: {ratio:.2f} times that with PyTorch's attention{note}.",
        table(["", *(f"seed {seed}" for seed in range(len(ours))), "mean"], rows),
    )


def compared_language_models(found: Found) -> str:
    """Packed on manyheads, padded on stock attention."""
    ratio = found["cpu_seconds"] / found["cpu_seconds_sdpa"]
    return joined(
        f"The same {found['steps']} steps twice: packed on manyheads, and padded (of a batch, "
        f"{found['padding']:.0%} is padding) on PyTorch's attention. Nats a token of "
        f"{found['test_texts']} held-out texts.",
        compared(found["nats"], found["nats_sdpa"], ratio, ".4f", ", padding and all"),
    )


def speech(found: Found) -> str:
    """Error rates, and one clip's words with their times."""
    words = [(word["text"], f"{word['start']:.2f}", f"{word['end']:.2f}")
             for word in found["word_times"]]  # fmt: skip
    return joined(
        f"{found['clips']} clips of Debian's pocketsphinx-testdata, {found['audio_seconds']:.0f} s,"
        f" {found['words']} words.",
        goal(
            found["wer"] <= 0.12,
            f"word error rate {found['wer']:.2%}, {found['errors']} errors, in lower case without "
            "punctuation (goal: at most 12.0 %)",
        ),
        f"After OpenAI's normaliser: {found['wer_normalised']:.2%}. Clips with the same text on "
        f"PyTorch's attention: {found['texts_as_sdpa']}. CPU time {found['cpu_seconds']:.1f} s, "
        f"PyTorch's {found['cpu_seconds_sdpa']:.1f} s.",
        "When each word of the first clip was spoken, by cross-attention:",
        table(["word", "from, s", "to, s"], words),
    )


def images(found: Found) -> str:
    """Accuracy on held-out pictures, from three seeds on both attentions."""
    name, accuracy = found["name"], mean(found["manyheads"])
    wanted = {"mnist": 0.97, "digits": 0.975}[name]
    note = " in float32, the faster there" if name == "mnist" else ""
    times = found["cpu_seconds"]
    return joined(
        goal(
            accuracy >= wanted,
            f"{accuracy:.2%} of the held-out pictures read (goal: at least {wanted:.1%}), a mean of"
            f" {len(found['manyheads'])} seeds",
        )
        + "\n"
        + compared(found["manyheads"], found["sdpa"], found["time_ratio"], ".2%", note),
        f"A training took {duration(times['manyheads'])} of CPU time, with PyTorch's attention "
        f"{duration(times['sdpa'])}.",
    )


def lines_of_text(found: Found) -> str:
    """What was drawn and read, and how far ONNX Runtime is from it."""
    return joined(
        goal(found["same_text"], "the same text as the whole model in ONNX Runtime")
        + "\n"
        + goal(
            found["difference"] < 1e-4,
            f"probabilities at most {found['difference']:.1e} from its own (goal: 1e-4)",
        ),
        f"After the two attention blocks, columns reach {found['largest_column']:.1f} and differ "
        f"by {found['column_difference']:.1e} at most. Character error rate: "
        f"{found['character_error_rate']:.2%}, ONNX Runtime's own.",
        table(["drawn", "read"], zip(found["drawn"], found["texts"], strict=True)),
    )
