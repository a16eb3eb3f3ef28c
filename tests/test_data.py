import json
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from tokenizers import Tokenizer

import data
from utils import is_bytes
from data import (
    Corpus,
    find_tokens,
    hub_documents,
    load_corpus,
    load_tokenizer,
    repeat_snippets,
    split_docstrings,
    stdlib_documents,
    str_tokens,
    text_of,
    to_tokens,
    token_text,
    train_bpe,
)

WORDS = "\n\n".join(
    f"Paragraph {i} says that the quick brown fox number {i * 7} jumps over the lazy dog." for i in range(400)
)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Corpus:
    folder = tmp_path_factory.mktemp("text")
    (folder / "words.txt").write_text(WORDS)
    return load_corpus(str(folder / "words.txt"), vocab=300, cache=str(folder / "cache"))


def test_docstrings_leave_the_code():
    code, docs = split_docstrings('"""Module."""\ndef f():\n    """What f\n    does."""\n    return "kept"\n')
    assert code == 'def f():\n    return "kept"\n'
    assert "Module." in docs
    assert "What f" in docs


def test_stdlib_parts_are_large_and_share_no_docstring():
    sources = data.read_stdlib()
    parts = stdlib_documents({name: sources[name] for name in ("argparse.py", "heapq.py")})
    assert sum(map(len, sources.values())) > 6e6
    assert "Heap queue algorithm" in parts["english"]["heapq.py"]
    assert "Heap queue algorithm" not in parts["code"]["heapq.py"]
    assert sum(name.startswith("topic ") for name in parts["english"]) > 50


def test_tokens_round_trip(small):
    ids = to_tokens(small.tokenizer, "the lazy dog")
    assert ids[0, 0] == small.bos
    assert "".join(str_tokens(small.tokenizer, ids[0, 1:])) == "the lazy dog"


def test_splits_are_memory_mapped_and_disjoint_documents(small):
    assert isinstance(small.train["text"], np.memmap)
    documents = lambda stream: {
        tuple(part) for part in np.split(stream, np.flatnonzero(stream == small.bos) + 1) if len(part)
    }
    train = documents(small.train["text"])
    held = documents(small.heldout["text"])
    assert train
    assert held
    assert not train & held


def test_cache_is_reused_and_keyed_by_the_text(tmp_path, capsys):
    file = tmp_path / "a.txt"
    file.write_text(WORDS)
    first = load_corpus(str(file), vocab=300, cache=str(tmp_path / "c"))
    again = load_corpus(str(file), vocab=300, cache=str(tmp_path / "c"))
    assert capsys.readouterr().out.count("training a byte-level BPE") == 1
    assert first.key == again.key
    file.write_text(WORDS + " And one more.")
    assert load_corpus(str(file), vocab=300, cache=str(tmp_path / "c")).key != first.key


@pytest.mark.parametrize("name", ["text.train.bin", "text.heldout.bin", "tokenizer.json", "meta.json"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_cache_that_is_not_whole_is_made_again(tmp_path, name, damage):
    file = tmp_path / "a.txt"
    file.write_text(WORDS)
    first = load_corpus(str(file), vocab=300, cache=str(tmp_path / "c"))
    before = first.train["text"].tolist()
    broken = tmp_path / "c" / first.key / name
    if damage == "cut":
        broken.write_bytes(broken.read_bytes()[: broken.stat().st_size // 2])
    else:
        broken.unlink()
    again = load_corpus(str(file), vocab=300, cache=str(tmp_path / "c"))
    assert again.train["text"].tolist() == before and len(again.heldout["text"])
    assert [folder.name for folder in (tmp_path / "c").iterdir()] == [first.key]


def test_what_a_killed_process_left_does_not_stop_one_of_the_same_id(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text(WORDS)
    key = load_corpus(str(file), vocab=300, cache=str(tmp_path / "other")).key
    (tmp_path / "c" / f".{key}.{os.getpid()}").mkdir(parents=True)
    assert load_corpus(str(file), vocab=300, cache=str(tmp_path / "c")).key == key


def test_a_full_disk_under_the_cache_is_one_line(tmp_path, monkeypatch):
    def full(path, content):
        raise OSError(28, "No space left on device")

    file = tmp_path / "a.txt"
    file.write_text(WORDS)
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(SystemExit, match="No space left on device"):
        load_corpus(str(file), vocab=300, cache=str(tmp_path / "c"))
    assert not list((tmp_path / "c").iterdir())


def test_rows_start_with_bos_and_come_from_the_split(small):
    rows = small.rows(np.random.default_rng(0), 8, 16, "heldout")
    stream = small.heldout["text"].astype(np.int64)
    windows = np.lib.stride_tricks.sliding_window_view(stream, 15)
    assert (rows[:, 0] == small.bos).all()
    assert all((windows == row[1:]).all(1).any() for row in rows)


def test_repeated_rows_say_a_snippet_twice():
    rows = np.arange(200 * 64).reshape(200, 64)
    out = repeat_snippets(np.random.default_rng(0), rows, np.ones(200, dtype=bool))
    for before, after in zip(rows, out):
        changed = np.flatnonzero(before != after)
        lag = changed - (after[changed] - before[0])
        assert len(changed) >= 16
        assert (np.diff(changed) == 1).all()
        assert len(set(lag)) == 1
        assert lag[0] >= len(changed)
    assert np.array_equal(repeat_snippets(np.random.default_rng(0), rows, np.zeros(200, dtype=bool)), rows)


def test_batch_shares_and_determinism(small):
    count = lambda batch: sum(len(set(row)) for row in batch.numpy())
    draw = lambda seed, **kw: small.batch(np.random.default_rng(seed), 64, 64, **kw)
    assert (draw(0, natural=0.5) == draw(0, natural=0.5)).all()
    assert (draw(0) != draw(1)).any()
    plain = draw(0)
    natural = draw(0, natural=1.0)
    shuffled = draw(0, shuffled=1.0)
    assert count(natural) < count(plain)
    assert (np.sort(plain.numpy(), 1)[:, 0] == np.sort(shuffled.numpy(), 1)[:, 0]).mean() > 0.5
    assert (shuffled != natural).any()


def test_a_foreign_tokenizer_is_used(tmp_path, small):
    other = train_bpe([WORDS], 280)
    other.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "t.txt").write_text(WORDS)
    corpus = load_corpus(str(tmp_path / "t.txt"), tokenizer=str(tmp_path), cache=str(tmp_path / "c"))
    assert corpus.d_vocab == 280
    assert corpus.key != small.key


def test_hub_datasets_stream_until_enough(tmp_path):
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps({"text": f"row {i} " + "x" * 1000}) for i in range(100)))
    rows = list(hub_documents(str(tmp_path), megabytes=0.01))
    assert 8 <= len(rows) <= 12
    assert rows[3][1].startswith("row 3")


def test_find_tokens(small):
    ids = find_tokens(small.tokenizer, "the")
    assert all(small.tokenizer.decode([i]).strip().lower() == "the" for i in ids)
    with pytest.raises(SystemExit, match="no token reads 'zzzebra'"):
        find_tokens(small.tokenizer, "zzzebra")


@pytest.mark.parametrize("bad", ["missing.txt", "./nowhere", "empty.txt", "binary.txt", "tiny.txt"])
def test_bad_text_is_refused_in_one_line(tmp_path, monkeypatch, bad):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("  \n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00\x9f")
    (tmp_path / "tiny.txt").write_text("Just a few words.")
    with pytest.raises(SystemExit) as error:
        load_corpus(bad, vocab=300).rows(np.random.default_rng(0), 2, 64)
    assert bad.split(".")[0] in str(error.value)
    assert "\n" not in str(error.value)


def test_unreachable_hub_names_are_refused_in_one_line(tmp_path):
    with pytest.raises(SystemExit, match="the hub said"):
        load_corpus("nobody/nothing", cache=str(tmp_path))
    with pytest.raises(SystemExit, match="cannot load 'nobody/nothing'"):
        load_corpus("stdlib", tokenizer="nobody/nothing", cache=str(tmp_path))


def test_bpe_is_the_same_every_time():
    assert train_bpe([WORDS], 300).to_str() == train_bpe([WORDS], 300).to_str()
    assert isinstance(train_bpe([WORDS], 300), Tokenizer)


def test_a_tokens_text_keeps_its_space_with_sentencepiece_too():
    path = ROOT.parent / "shared/models/stories260K/tokenizer.json"
    if not path.exists():
        pytest.skip("no shared/models here")
    tokenizer = Tokenizer.from_file(str(path))
    ids = tokenizer.encode("Once upon a time, there was").ids
    assert "".join(str_tokens(tokenizer, ids)) == "<s> Once upon a time, there was"
    assert data.token_text(tokenizer, 10**6) == ""
    assert str_tokens(tokenizer, data.find_tokens(tokenizer, " upon")[:1]) == [" upon"]  # exactly it comes first
    story = tokenizer.encode("there was a café", add_special_tokens=False).ids
    assert data.text_of(tokenizer, story) == " there was a café"  # é is two bytes here, two tokens


def test_files_of_one_name_in_two_folders_are_both_read(tmp_path, capsys):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "readme.txt").write_text(f"text of {folder}")
    (tmp_path / "c.png").write_bytes(b"\x89PNG")
    assert data.read_files(tmp_path) == {"a/readme.txt:0": "text of a", "b/readme.txt:0": "text of b"}
    assert "2 files, 18 characters; left out: 1 ending in .png" in capsys.readouterr().out


def test_what_is_not_text_of_the_folder_is_left_out(tmp_path, capsys):
    for folder in ("weird.py", ".venv/lib", ".git", "venv/lib"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("BOOK.TXT", "weird.py/a.txt", ".venv/lib/x.py", ".git/y.md", "venv/lib/z.py"):
        (tmp_path / name).write_text("words")
    assert list(data.read_files(tmp_path)) == ["BOOK.TXT:0", "weird.py/a.txt:0"]
    assert "left out: 2 hidden, 1 of installed packages" in capsys.readouterr().out


def test_text_is_utf8_whatever_the_locale_and_a_byte_order_mark_is_none(tmp_path):
    file = tmp_path / "t.txt"
    file.write_bytes("\ufeffnaïve".encode())
    code = f"import data, pathlib; assert data.read_files(pathlib.Path({str(file)!r})) == {{'t.txt:0': 'na\\xefve'}}"
    environment = os.environ | {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_long_words_are_cut_for_training_and_short_ones_left(monkeypatch):
    text = "x = " + "ACGT" * 200 + " some words\n\n" + "-" * 300
    pieces = data.cut_long_words(text)
    assert "".join(pieces) == text and len(pieces) > 1
    assert max(len(word) for piece in pieces for word in piece.split()) <= 512
    assert data.cut_long_words(WORDS) == [WORDS]
    dna = "".join(random.Random(0).choice("ACGT") for _ in range(200_000))
    start = time.perf_counter()
    train_bpe([dna], 400)
    assert time.perf_counter() - start < 10  # uncut, it takes minutes


@pytest.mark.skipif(not (ROOT.parent / "shared/tokenizers/gpt2").is_dir(), reason="needs GPT-2's tokenizer")
def test_a_part_of_a_character_is_its_bytes():
    tokenizer = load_tokenizer(str(ROOT.parent / "shared/tokenizers/gpt2"))
    ids = tokenizer.encode("中国 naïve", add_special_tokens=False).ids
    assert str_tokens(tokenizer, ids) == ["中", "<0xE5><0x9B>", "<0xBD>", " naïve"]
    assert [is_bytes(token) for token in str_tokens(tokenizer, ids)] == [False, True, True, False]
    assert text_of(tokenizer, ids) == "中国 naïve"


def test_bytes_of_all_parts_of_characters():
    tokenizer = train_bpe(["a b c"], 260)  # all bytes, and little more
    for text in ("€", "ÿ", "\x80", "🙂"):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        said = [token_text(tokenizer, i) for i in ids]
        assert bytes.fromhex("".join(re.findall("0x(..)", "".join(said)))) == text.encode()


def test_padding_and_truncation_of_a_saved_tokenizer_are_not_its_own(tmp_path):
    tokenizer = train_bpe(["a b c d"], 260)
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(str(tmp_path / "tokenizer.json"))
    for text in ("a", "a b c d a b c d a b c d"):
        assert loaded.decode(loaded.encode(text, add_special_tokens=False).ids) == text


def test_a_corpus_with_an_empty_part_opens(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/a.txt").write_text("some words to read, and more of them. " * 200)
    (tmp_path / "texts/z.txt").write_text("")
    for _ in range(2):  # tokenized, and found again
        corpus = load_corpus("texts", vocab=270)
        assert sum(len(part) for part in corpus.train.values()) > 100
