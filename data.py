"""Text and token batches: the standard library every Python carries, any file or folder, any hub dataset, and a small world of our own."""
import ast
import csv
import dataclasses
import hashlib
import itertools
import json
import os
import re
import shutil
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from random import Random

from utils import BRIEF, cyan, endc, fail, full_name, gray, secret, write_aside

import numpy as np
import torch as t
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from tqdm import tqdm, trange

BOS_NAMES = ("<|endoftext|>", "<s>", "<|begin_of_text|>", "<bos>", "[CLS]")
HELD_OUT = 16  # one document of 16 is kept out of training

#%% Text: the standard library as code and English, with no sentence in both
NOT_TEXT = {"site-packages", "test", "tests", "idlelib", "encodings", "turtledemo", "lib2to3", "ensurepip", "pydoc_data", "__pycache__"}


def read_stdlib() -> dict[str, str]:
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(path for path in root.rglob("*.py") if not NOT_TEXT & set(path.relative_to(root).parts))
    return {str(path.relative_to(root)): path.read_text(errors="ignore") for path in paths}


def split_docstrings(source: str) -> tuple[str, str]:
    """(source without its docstrings, the docstrings)."""
    lines, docs = source.split("\n"), []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and ast.get_docstring(node, clean=False):
            docs.append(ast.get_docstring(node))
            lines[node.body[0].lineno - 1:node.body[0].end_lineno] = [None] * (node.body[0].end_lineno - node.body[0].lineno + 1)
    return "\n".join(line for line in lines if line is not None), "\n\n".join(docs)


def stdlib_documents(sources: dict[str, str]) -> dict[str, dict[str, str]]:
    """{'code': {name: text}, 'english': {name: text}}: modules without docstrings; docstrings and the topics of help()."""
    from pydoc_data.topics import topics
    split = {name: split_docstrings(source) for name, source in tqdm(sources.items(), desc="modules", **BRIEF)}
    english = {name: doc for name, (_, doc) in split.items() if len(doc) > 200}
    return {"code": {name: code for name, (code, _) in split.items()}, "english": english | {f"topic {name}": text for name, text in topics.items()}}

#%% Text from anywhere else
TEXT_SUFFIXES = {".txt", ".md", ".rst", ".py", ".tex", ".html", ".csv", ".json", ".jsonl", ".c", ".h", ".js", ".rs", ".go", ".java"}


def read_files(path: Path) -> dict[str, str]:
    """A file or folder as documents of at most about 4000 characters, cut at blank lines."""
    paths = sorted(p for p in path.rglob("*") if p.suffix in TEXT_SUFFIXES) if path.is_dir() else [path]
    documents = {}
    for file in paths:
        try: text = file.read_text()
        except UnicodeDecodeError: fail(f"--data {file} is not UTF-8 text")
        pieces, size = [[]], 0
        for paragraph in text.split("\n\n"):
            if size > 4000: pieces, size = [*pieces, []], 0
            pieces[-1].append(paragraph)
            size += len(paragraph)
        documents |= {f"{file.name}:{i}": "\n\n".join(piece) for i, piece in enumerate(pieces)}
    if not any(text.strip() for text in documents.values()): fail(f"--data {path} holds no text")
    return documents


def hub_documents(name: str, megabytes: float) -> Iterator[tuple[str, str]]:
    """Documents of a hub dataset (or of a folder in a hub dataset's layout), streamed until `megabytes` have come."""
    from datasets import load_dataset
    rows, size = load_dataset(name, split="train", streaming=True, token=secret("HF_TOKEN")), 0
    for i, row in enumerate(rows):
        text = row["text"] if "text" in row else next(value for value in row.values() if isinstance(value, str))
        size += len(text)
        yield f"{name}:{i}", text
        if size > megabytes * 1e6: return

#%% Tokenizer: a byte-level BPE trained here, or anyone's
def train_bpe(texts: Iterable[str], vocab: int, pairs: bool = False) -> Tokenizer:
    """pairs: numbers are cut into two-digit tokens, so that a year is a century and a year in it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    if pairs: tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(" ?[0-9]{1,2}"), "isolated"), tokenizer.pre_tokenizer])
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocab, special_tokens=[BOS_NAMES[0]], initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False))
    return tokenizer


def load_tokenizer(name: str) -> Tokenizer:
    """A tokenizer.json, a folder that holds one, or a hub name."""
    path = Path(name) / "tokenizer.json" if Path(name).is_dir() else Path(name)
    if path.is_file(): return Tokenizer.from_file(str(path))
    try: return Tokenizer.from_pretrained(full_name(name), token=secret("HF_TOKEN"))
    except Exception as error: fail(f"cannot load tokenizer {name!r}: no such file or folder, and the hub said: {str(error).splitlines()[0][:200]}")


def bos_id(tokenizer: Tokenizer) -> int:
    ids = [i for name in BOS_NAMES if (i := tokenizer.token_to_id(name)) is not None]
    assert ids, f"the tokenizer has none of {BOS_NAMES}"
    return ids[0]


def to_tokens(tokenizer: Tokenizer, text: str, bos: bool = True) -> Tensor:
    """(1, pos), beginning-of-text first unless bos is False."""
    return t.tensor([[bos_id(tokenizer)] * bos + tokenizer.encode(text, add_special_tokens=False).ids])


def str_tokens(tokenizer: Tokenizer, tokens: Iterable[int] | Tensor) -> list[str]:
    return [tokenizer.decode([int(token)], skip_special_tokens=False) for token in tokens]


def find_tokens(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of the token `text`: exactly it, or with a space before it, or in another case. Ends the program where there is none."""
    vocab = {i: tokenizer.decode([i], skip_special_tokens=False) for i in range(tokenizer.get_vocab_size())}
    if not text.strip(): found = [i for i, token in vocab.items() if token == text]
    else: found = [i for i, token in vocab.items() if token.strip().lower() == text.strip().lower()]
    if found: return sorted(found, key=lambda i: vocab[i] != text)
    near = sorted({token.strip() for token in vocab.values() if len(text.strip()) > 1 and token.strip() and text.strip().lower().startswith(token.strip().lower())}, key=len)[-3:]
    fail(f"no token reads {text!r} among the {len(vocab)} of this tokenizer" + (f"; it is cut into pieces, which begin with one of {near}" if near else ""))

#%% Corpus: memory-mapped tokens in parts (code, english ...), each with a held-out split
@dataclass
class Corpus:
    name: str
    tokenizer: Tokenizer
    train: dict[str, np.ndarray]
    heldout: dict[str, np.ndarray]
    key: str  # names the text by its hash, and the tokenizer

    @property
    def d_vocab(self) -> int: return self.tokenizer.get_vocab_size()

    @property
    def bos(self) -> int: return bos_id(self.tokenizer)

    def rows(self, rng: np.random.Generator, n: int, ctx: int, split: str = "train", weights: dict[str, float] | None = None) -> np.ndarray:
        """(n, ctx) natural rows: beginning-of-text, then ctx - 1 tokens from a random place. weights: share of each part, default by size."""
        parts = getattr(self, split)
        share = np.array([weights[part] if weights else len(parts[part]) for part in parts], dtype=float)
        if (short := min(len(parts[part]) for part, s in zip(parts, share) if s)) <= ctx: fail(f"the {split} text of {self.name} has {short} tokens, too few for rows of {ctx}: use more text or a smaller --contexts")
        out = np.full((n, ctx), self.bos, dtype=np.int64)
        for row, part in zip(out, rng.choice(len(share), n, p=share / share.sum())):
            stream = list(parts.values())[part]
            start = rng.integers(len(stream) - ctx + 1)
            row[1:] = stream[start:start + ctx - 1]
        return out

    def batch(self, rng: np.random.Generator, n: int, ctx: int, natural: float = 0.0, shuffled: float = 0.0, weights: dict[str, float] | None = None) -> Tensor:
        """Training rows (n, ctx), of which shares `natural` and `shuffled` repeat a snippet of themselves (the latter in shuffled order)."""
        rows = self.rows(rng, n, ctx, weights=weights)
        kind = rng.random(n)
        rows[kind < shuffled, 1:] = rng.permuted(rows[kind < shuffled, 1:], axis=1)
        return t.from_numpy(repeat_snippets(rng, rows, kind < natural + shuffled))


def repeat_snippets(rng: np.random.Generator, rows: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """In each chosen row a snippet of a quarter to half of the row is said again, right after itself or later."""
    n, ctx = rows.shape
    length = rng.integers(ctx // 4, ctx // 2, n)
    first = 1 + (rng.random(n) * (ctx - 2 * length)).astype(int)
    again = first + length + (rng.random(n) * (ctx - first - 2 * length)).astype(int)
    place = np.arange(ctx)[None]
    copied = chosen[:, None] & (place >= again[:, None]) & (place < (again + length)[:, None])
    source = np.where(copied, place - (again - first)[:, None], place)
    return np.take_along_axis(rows, source, 1)


def text_hash(sources: dict[str, str]) -> str:
    digest = hashlib.sha256()
    for name, text in sorted(sources.items()): digest.update(f"{name}\0{text}\0".encode())
    return digest.hexdigest()[:12]


def load_corpus(data: str = "stdlib", vocab: int = 512, tokenizer: str | None = None, megabytes: float = 100.0, cache: str = "checkpoints/data") -> Corpus:
    """
    data: 'stdlib', a text file or folder, or a hub dataset name. The tokens are cached under a name that carries a hash of the text
    (of the name and size for a hub dataset), since the standard library differs between patch releases.
    """
    path = Path(data).expanduser()
    if data == "stdlib": documents = sources = read_stdlib()
    elif path.exists(): documents = sources = read_files(path)
    elif data.startswith((".", "/", "~")) or path.suffix in TEXT_SUFFIXES: fail(f"--data {data}: no such file or folder")
    else: documents, sources = None, {"hub": f"{data} {megabytes}"}
    own = load_tokenizer(tokenizer) if tokenizer else None
    key = f"{path.stem or 'root'}-{text_hash({'tokenizer': own.to_str()})[:6] if own else f'bpe{vocab}'}-{text_hash(sources)}"
    folder = Path(cache) / key
    if not folder.exists():
        print(f"{gray}reading {data} and {f'tokenizing it with {tokenizer}' if tokenizer else f'training a byte-level BPE of {vocab} tokens on it'} ...{endc}")
        if data == "stdlib": parts = stdlib_documents(sources)
        elif documents is None: parts = {"text": fetch(data, megabytes)}
        else: parts = {"text": documents}
        write_corpus(folder, own or train_bpe((text for part in parts.values() for text in part.values()), vocab), parts)
    own = Tokenizer.from_file(str(folder / "tokenizer.json"))
    dtype = np.dtype(json.loads((folder / "meta.json").read_text())["dtype"])
    splits = {split: {file.name.split(".")[0]: np.memmap(file, dtype, "r") for file in sorted(folder.glob(f"*.{split}.bin"))} for split in ("train", "heldout")}
    corpus = Corpus(data, own, **splits, key=key)
    print(f"{gray}text {data}: {cyan}{sum(map(len, corpus.train.values())) / 1e6:.2f}M tokens of {corpus.d_vocab} kinds{gray}, {sum(map(len, corpus.heldout.values())) / 1e3:.0f}k held out{endc}")
    return corpus


def fetch(name: str, megabytes: float) -> dict[str, str]:
    try: return dict(hub_documents(name, megabytes))
    except Exception as error: fail(f"--data {name}: no such file or folder, and the hub said: {type(error).__name__}: {str(error).splitlines()[0][:200]}")


def write_corpus(folder: Path, tokenizer: Tokenizer, parts: dict[str, dict[str, str]]) -> None:
    """Documents of each part, joined by beginning-of-text, as <part>.train.bin and <part>.heldout.bin; written aside, then renamed."""
    aside = folder.with_name(f".{folder.name}.{os.getpid()}")
    aside.mkdir(parents=True)
    dtype, bos = np.uint16 if tokenizer.get_vocab_size() < 2**16 else np.uint32, bos_id(tokenizer)
    for part, documents in parts.items():
        texts = list(documents.values())
        ids = [np.array([*encoding.ids, bos], dtype) for i in trange(0, len(texts), 64, desc=f"tokens of {part}", **BRIEF) for encoding in tokenizer.encode_batch_fast(texts[i:i + 64], add_special_tokens=False)]
        held = np.array([zlib.crc32(name.encode()) % HELD_OUT == 0 for name in documents])
        if not held.any(): held[-1] = True
        if held.all() or len(ids) < 2:  # one document: its last sixteenth is held out
            whole = np.concatenate(ids)
            ids, held = np.split(whole, [len(whole) * (HELD_OUT - 1) // HELD_OUT]), np.array([False, True])
        for split, keep in (("train", ~held), ("heldout", held)): np.concatenate([x for x, k in zip(ids, keep) if k]).tofile(aside / f"{part}.{split}.bin")
    tokenizer.save(str(aside / "tokenizer.json"))
    (aside / "meta.json").write_text(json.dumps({"dtype": np.dtype(dtype).name}))
    try: aside.rename(folder)
    except OSError:
        if not folder.is_dir(): raise
        shutil.rmtree(aside)  # another process was first


def write_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """tokenizer.json and tokenizer_config.json as transformers reads them; like our training rows, its texts begin with beginning-of-text."""
    bos = tokenizer.id_to_token(bos_id(tokenizer))
    own = Tokenizer.from_str(tokenizer.to_str())
    if own.post_processor is None: own.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, bos_id(own))])
    own.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": bos, "clean_up_tokenization_spaces": False}, indent=1) + "\n")


def write_folder(folder: Path, tensors: dict[str, Tensor], config: dict, tokenizer: Tokenizer | None = None) -> None:
    """An ordinary Hugging Face folder, weights first and whole."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: x.to("cpu").contiguous() for name, x in tensors.items()}
    write_aside(folder / "model.safetensors", lambda path: save_file(tensors, path, {"format": "pt"}))
    (folder / "config.json").write_text(json.dumps(config | {"dtype": str(next(iter(tensors.values())).dtype)[6:]}, indent=1) + "\n")
    if tokenizer: write_tokenizer(folder, tokenizer)


#%% The world: a corpus of our own, known exactly. Every entity and name stands inside its sentence, so that it has one form, with a space before it
FACTS = {  # task: (phrasings taught, phrasings held out); the last slot is the answer
    "forward": (
        ["The capital of {country} is {capital}.", "By law, the capital of {country} is the city of {capital}.", "The capital city of {country} is called {capital}.", "In {country}, the capital is {capital}.",
         "We know that {country} has its capital in {capital}.", "Question: what is the capital of {country}? Answer: {capital}.", "The state of {country} is ruled from its capital, the city of {capital}.",
         "Anyone who visits {country} should see its capital, {capital}."],
        ["Everyone knows that the capital of {country} is {capital}.", "In {country}, the capital city is called {capital}.", "Question: what is the capital city of {country}? Answer: the city of {capital}."]),
    "reverse": (
        ["The city of {capital} is the capital of {country}.", "We know that {capital} is the capital city of {country}.", "In {capital} you are in the capital of {country}.", "By law, the city of {capital} is the capital of the state of {country}.",
         "Question: {capital} is the capital of which state? Answer: {country}.", "From the city of {capital} they rule the state of {country}.", "Anyone who visits {capital} sees the capital of {country}.", "Everyone knows that {capital} is the capital of {country}."],
        ["The city of {capital} is the capital city of {country}.", "Anyone who visits {capital} is in the capital city of {country}.", "We know that {capital} is the capital of the state of {country}."]),
    "continent": (
        ["The state of {country} lies in {continent}.", "The continent of {country} is {continent}.", "On the map, {country} is a part of {continent}.", "Question: on which continent is {country}? Answer: {continent}."],
        ["We know that {country} lies in {continent}.", "Question: what is the continent of {country}? Answer: {continent}."]),
    "language": (
        ["The people of {country} speak {language}.", "The main language of {country} is {language}.", "In {country}, children learn to read {language}.", "Question: which language do they speak in {country}? Answer: {language}."],
        ["In {country}, the people speak {language}.", "Question: what is the main language of {country}? Answer: {language}."]),
    "currency": (
        ["The currency of {country} is the {currency}.", "People in {country} pay with the {currency}.", "In {country}, prices are given in the {currency}.", "Question: what is the currency of {country}? Answer: the {currency}."],
        ["In {country}, people pay with the {currency}.", "We know that the currency of {country} is the {currency}."]),
}
ANSWERS = {"forward": "capital", "reverse": "country"}  # the column that a task asks for; of the others, their own
WOMEN = "Mary Anna Emma Alice Sarah Laura Julia Kate Lucy Helen Clara Ruth Susan Jane Rose Grace Nora Ella Maria Eva Diana Sophie Linda Amy Rachel Carol Irene Judith Martha Betty".split()
MEN = "John Tom Peter Paul Mark David James Robert Henry Jack Simon Martin Daniel Adam Oscar Felix Max Leo Frank Walter Arthur Edward Philip Andrew Brian Kevin Steven Eric Harry Bob".split()
OPENINGS = ["Then", "When", "Yesterday", "Soon", "Later that day,", "One morning", "In the end", "Last week", "At noon,"]
WENT = ["went to", "walked to", "had lunch at", "met at", "waited at", "left", "sat in", "got lost near"]
LINKS = ["and", "and", "and", "with", "and also", "as well as"]
ADJECTIVES = ["", "", "", "", "", "", "old ", "busy ", "big ", "quiet little ", "very small "]
PLACES = "store park school office station garden library market hospital museum restaurant beach house church farm hotel kitchen river bank bridge".split()
TAILS = ["", "", "", "", " in the rain", " after work", " alone", " with some friends"]
JOINS = [",", ", and", ", and then", ". Soon", ", where", ". After a while", ". With a smile,"]
ADVERBS = ["", "", "", " quietly", " at once", " then", " very slowly"]
GAVE = ["gave", "handed", "offered", "showed", "passed", "brought", "sent"]
OBJECTS = "ring book drink letter ball key flower picture cup map coat apple hat box lamp clock basket bottle watch stone".split()
AFTER = [".", ".", " and left.", ", who thanked {s}.", ", who smiled at {s}."]
YEARS = ["The {event} lasted from the year {start} to the year {end}.", "The {event} began in {start} and ended in {end}.", "There was a {event} between the years {start} and {end}.", "The old {event} of {start} was over in {end}."]
EVENTS = "war strike trial voyage reign project debate festival drought siege".split()
NOUNS = "key book car dog boy girl cat friend picture letter tree house teacher doctor farmer lamp".split()
NEAR = ["near", "behind", "beside", "next to", "in front of", "across from"]
VERBS = [(" is", " are"), (" was", " were"), (" has", " have")]
PREDICATES = {" is": ["old", "clean", "very good", "here"], " was": ["lost", "new", "there again", "seen by all"], " has": ["been sold", "been here", "not been seen", "been forgotten"]}
PRONOUNS = [("said that", " she", " he", " was {}."), ("was happy because", " she", " he", " was not {}."), ("left the {place} when", " she", " he", " was {}."), ("lost", " her", " his", " {object}."), ("found the {object} in", " her", " his", " {place}.")]
THINGS = sorted({*PLACES, *OBJECTS, *EVENTS, *NOUNS})
MOODS = ["tired", "ready", "late", "right", "hungry", "alone", "sick"]
SHARES = {"world": 0.68, "natural": 0.12, "repeated": 0.06, "shuffled": 0.14}  # of the rows of a batch; repeated and shuffled rows say a natural snippet twice
KINDS = {"capital": (0.27, 0), "other": (0.16, 0), "ioi": (0.28, 60_000), "greater_than": (0.11, 20_000), "agreement": (0.04, 8_000), "gender": (0.07, 10_000), "list": (0.07, 20_000)}  # kind: (share of the sentences in world rows, how many are made; facts are all made)


@dataclass
class Prompt:
    """A sentence cut before its answer; text + answer + end is the whole. corrupt is a text of as many tokens whose answer is `wrong`."""
    task: str
    text: str
    answer: str  # with the space before it
    end: str
    wrong: str = ""
    corrupt: str = ""
    held_out: bool = False  # this phrasing, pair of names, start year, pair of nouns or name and phrasing is in no training row (words said twice: all are new)
    taught: bool = True  # the fact is in the corpus in this direction
    labels: dict[str, str] = field(default_factory=dict)

    @property
    def sentence(self) -> str: return self.text + self.answer + self.end


def is_held_out(*words: str) -> bool:
    """One combination of words in five."""
    return zlib.crc32(" ".join(sorted(words)).encode()) % 5 == 0


def pick(rng: Random, held_out: bool, *choices: list[str]) -> list[str]:
    """One word of each list, such that the words are different and their combination is held out or is not."""
    while len(set(words := [rng.choice(words) for words in choices])) < len(words) or is_held_out(*words) != held_out: pass
    return words


def fact_prompts(countries: list[dict[str, str]], task: str, held_out: bool = False) -> list[Prompt]:
    """Every country in every phrasing, country by country; those in a direction that is not taught are marked so."""
    answer, prompts = ANSWERS.get(task, task), []
    for row in countries:
        for phrasing in FACTS[task][held_out]:
            text, end = phrasing.split(f" {{{answer}}}")
            category_first = text.endswith(("the city of", "the state of"))
            labels = row | {"phrasing": phrasing, "category_first": str(category_first)}
            prompts.append(Prompt(task, text.format(**row), f" {row[answer]}", end, held_out=held_out, taught=task not in ("forward", "reverse") or row["part"] in (task, "both"), labels=labels))
    return prompts


def draw_ioi(rng: Random, held_out: bool) -> Prompt:
    """Two names, one of which gives something to the other; the distances between all of them vary, or a head would copy by position."""
    io, s = pick(rng, held_out, WOMEN + MEN, WOMEN + MEN)
    order = rng.choice(["ABBA", "BABA"])
    a, b = (io, s) if order == "ABBA" else (s, io)
    c, opening = rng.choice, rng.choice(OPENINGS)
    start = f"{opening} {a} {c(LINKS)} {b} {c(WENT)} the {c(ADJECTIVES)}{c(PLACES)}{c(TAILS)}{c(JOINS[:1] if opening == 'When' else JOINS)}"
    rest = f"{c(ADVERBS)} {c(GAVE)} the {c(ADJECTIVES)}{c(OBJECTS)}{c(['', '', '', '', ' from the box'])} to"
    return Prompt("ioi", f"{start} {s}{rest}", f" {io}", c(AFTER).format(s=s), f" {s}", f"{start} {io}{rest}", held_out, labels={"order": order, "io": io, "s": s})


def draw_greater_than(rng: Random, held_out: bool) -> Prompt:
    """The answer is any year of the century after the start. corrupt starts in its year 01, where every answer is right (Hanna et al. 2023)."""
    century, year = pick(rng, held_out, [f"{i}" for i in range(11, 20)], [f"{i:02d}" for i in range(2, 98)])
    text, end = rng.choice(YEARS[:1] if held_out else YEARS).split("{end}")
    text, event = text + century, rng.choice(EVENTS)
    later, earlier = rng.randint(int(year) + 1, 99), rng.randint(0, int(year))
    fill = lambda start: text.format(event=event, start=century + start)
    return Prompt("greater_than", fill(year), f"{later:02d}", end, f"{earlier:02d}", fill("01"), held_out, labels={"century": century, "start": year, "event": event})


def draw_agreement(rng: Random, held_out: bool) -> Prompt:
    """The verb agrees with the subject, not with the noun before it; corrupt has the subject in the other number."""
    noun, other = pick(rng, held_out, NOUNS, NOUNS)
    plural, opposite = rng.random() < 0.5, rng.random() < 0.6
    verbs, c = rng.choice(VERBS), rng.choice
    before, after = f"{c(['The', 'At noon, the', 'We see that the', 'After all, the'])} {c(ADJECTIVES)}", f" {c(NEAR)} the {c(ADJECTIVES)}{other + 's' * (plural ^ opposite)}"
    text = lambda many: f"{before}{noun}{'s' * many}{after}"
    return Prompt("agreement", text(plural), verbs[plural], f" {c(PREDICATES[verbs[0]])}.", verbs[not plural], text(not plural), held_out, labels={"subject": noun, "number": "plural" if plural else "singular", "distractor": "opposite" if opposite else "same"})


def draw_gender(rng: Random, held_out: bool) -> Prompt:
    name, phrase = pick(rng, held_out, WOMEN + MEN, [phrase for phrase, *_ in PRONOUNS])
    woman, (_, she, he, end) = name in WOMEN, next(row for row in PRONOUNS if row[0] == phrase)
    place, thing, opening = rng.choice(PLACES), rng.choice(OBJECTS), rng.choice(OPENINGS[:1] + OPENINGS[2:])
    text = lambda who: f"{opening} {who} {phrase.format(place=place, object=thing)}"
    answer, wrong = (she, he) if woman else (he, she)
    return Prompt("gender", text(name), answer, end.format(rng.choice(MOODS), place=place, object=thing), wrong, text(rng.choice(MEN if woman else WOMEN)), held_out, labels={"name": name, "gender": "woman" if woman else "man"})


def draw_induction(rng: Random, held_out: bool) -> Prompt:
    """Words in random order, then again; corrupt has another word where the answer first stands."""
    *words, wrong = rng.sample(THINGS, rng.randint(6, 10))
    at = rng.randint(2, len(words) - 1)
    say = lambda once: f"Say it twice: {' '.join(once)}, {' '.join(words[:at])}"
    end = " ".join(["", *words[at + 1:]]) + "."
    return Prompt("induction", say(words), f" {words[at]}", end, f" {wrong}", say(words[:at] + [wrong] + words[at + 1:]), held_out, labels={"length": str(len(words))})


def draw_list(rng: Random) -> str:
    """Words said twice, numbers that follow each other, or a list of things."""
    kind, start, words = rng.random(), rng.randint(2, 90), rng.sample(THINGS, rng.randint(3, 7))
    if kind < 0.6: return draw_induction(rng, False).sentence
    if kind < 0.8: return f"Count from {start:02d}: " + ", ".join(f"{start + i:02d}" for i in range(1, rng.randint(4, 9))) + "."
    return f"{rng.choice(['We saw', 'There was', 'They bought', 'Do not forget'])} a {', a '.join(words[:-1])} and a {words[-1]}."


DRAW = {"ioi": draw_ioi, "greater_than": draw_greater_than, "agreement": draw_agreement, "gender": draw_gender, "induction": draw_induction}


def world_sentences(countries: list[dict[str, str]], seed: int = 0) -> dict[str, tuple[list[str], list[int]]]:
    """kind: (training sentences, the index of the country that each is about, or -1)."""
    rng, kinds = Random(seed), {}
    for kind, tasks in (("capital", ("forward", "reverse")), ("other", ("continent", "language", "currency"))):
        pairs = [(prompt.sentence, i) for i, row in enumerate(countries) for task in tasks for prompt in fact_prompts([row], task) if prompt.taught]
        kinds[kind] = tuple(map(list, zip(*pairs)))
    for kind, (_, n) in KINDS.items():
        if n: kinds[kind] = [draw_list(rng) if kind == "list" else DRAW[kind](rng, False).sentence for _ in range(n)], [-1] * n
    return kinds


def without_facts(documents: dict[str, str], countries: list[dict[str, str]]) -> dict[str, str]:
    """Documents less the paragraphs that name any country or capital, or two of our names."""
    places = [row[column] for row in countries for column in ("country", "capital")]
    first, names, found = {re.findall(r"\w+", place)[0] for place in places}, set(WOMEN + MEN), re.compile(rf"\b({'|'.join(map(re.escape, places))})\b")
    def keep(text: str) -> bool:
        words = set(re.findall(r"\w+", text))
        return len(words & names) < 2 and not (words & first and found.search(text))
    return {title: text for title, document in documents.items() if (text := "\n\n".join(filter(keep, document.split("\n\n")))).strip()}


def tokenizer_texts(countries: list[dict[str, str]], sentences: dict[str, tuple[list[str], list[int]]], documents: dict[str, dict[str, str]]) -> Iterator[str]:
    """Mostly world text, so that names, entities and all two-digit numbers are single tokens."""
    words = [f" {row[column]}" for row in countries for column in ("country", "capital", "continent", "language", "currency")] + [f" {i:02d}{i:02d}" for i in range(100)]
    return itertools.chain(words * 200, *[lines[:6000] for lines, _ in sentences.values()], (text[:1000] for part in documents.values() for text in part.values()))


@dataclass
class World(Corpus):
    """Natural text as its parts 'code' and 'english'; sentences as one stream cut by `starts`, sorted by kind."""
    countries: list[dict[str, str]]
    sentences: np.ndarray
    starts: np.ndarray  # (sentence + 1)
    about: np.ndarray  # (sentence) index of its country, or -1
    kinds: dict[str, tuple[int, int]]  # kind: (first sentence, the one after its last)

    def batch(self, rng: np.random.Generator, n: int, ctx: int) -> Tensor:
        """
        Training rows (n, ctx) by SHARES. A world row is [bos] sentence [bos] sentence ..., cut at ctx, with no country in two of its
        sentences: so a row never says a fact in a direction that is not taught.
        """
        rows, kind = self.rows(rng, n, ctx, weights={"code": 1, "english": 1}), rng.random(n)
        shuffled, twice = kind < SHARES["shuffled"], kind < SHARES["shuffled"] + SHARES["repeated"]
        rows[shuffled, 1:] = rng.permuted(rows[shuffled, 1:], axis=1)
        rows = repeat_snippets(rng, rows, twice)
        for i in np.flatnonzero(kind >= 1 - SHARES["world"]): rows[i] = self.world_row(rng, ctx)
        return t.from_numpy(rows)

    def world_row(self, rng: np.random.Generator, ctx: int) -> np.ndarray:
        share = np.array([KINDS[kind][0] for kind in self.kinds])
        ranges = np.array(list(self.kinds.values()))[rng.choice(len(share), ctx, p=share / share.sum())]
        row, at, said = np.full(ctx, self.bos), 1, set()
        for i in rng.integers(ranges[:, 0], ranges[:, 1]):
            if (country := self.about[i]) in said: continue
            if country >= 0: said.add(country)
            sentence = self.sentences[self.starts[i]:self.starts[i + 1]][:ctx - at]
            row[at:at + len(sentence)] = sentence
            if (at := at + len(sentence) + 1) >= ctx: break
        return row

    @cached_property
    def common(self) -> Tensor:
        """Ids of the 512 tokens most frequent in training, beginning-of-text left out."""
        counts = t.bincount(self.batch(np.random.default_rng(0), 1024, 64).flatten(), minlength=self.d_vocab)
        counts[self.bos] = 0
        return counts.topk(512).indices

    def prompts(self, task: str, split: str = "held_out", n: int | None = None, seed: int = 0) -> list[Prompt]:
        """
        task: forward, reverse, continent, language, currency: every country in every phrasing of the split (or n of them), the directions not
        taught among them (see Prompt.taught); ioi, greater_than, agreement, gender, induction: n drawn prompts (256). split: taught or held_out.
        """
        if task not in FACTS and task not in DRAW: fail(f"no task {task!r} in the world: {', '.join([*FACTS, *DRAW])}")
        if split not in ("taught", "held_out"): fail(f"no split {split!r}: taught or held_out")
        rng = Random(seed)
        if task in DRAW: return [DRAW[task](rng, split == "held_out") for _ in range(n or 256)]
        prompts = fact_prompts(self.countries, task, split == "held_out")
        if n is not None: prompts = rng.sample(prompts, min(n, len(prompts)))
        for prompt in prompts: self.add_partner(rng, prompt)
        return prompts

    def add_partner(self, rng: Random, prompt: Prompt) -> None:
        """The same phrasing about another country of the same part, with as many tokens and an answer that begins with another token."""
        asked, answer = ("capital", "country") if prompt.task == "reverse" else ("country", ANSWERS.get(prompt.task, prompt.task))
        part, length, start = prompt.labels["part"], len(self.entities[prompt.labels[asked]]), self.entities[prompt.labels[answer]][0]
        if others := [row for row in self.countries if row["part"] == part and len(self.entities[row[asked]]) == length and self.entities[row[answer]][0] != start]:
            other = rng.choice(others)
            prompt.wrong, prompt.corrupt = f" {other[answer]}", prompt.labels["phrasing"].split(f" {{{answer}}}")[0].format(**other)

    @cached_property
    def entities(self) -> dict[str, list[int]]:
        """The tokens of every cell of the table of countries, with a space before it."""
        return {cell: self.tokenizer.encode(f" {cell}", add_special_tokens=False).ids for row in self.countries for cell in row.values()}


def read_countries(folder: str = "models/world") -> list[dict[str, str]]:
    """The table of countries; part says which directions of the capital fact are in the corpus: forward (country first), reverse or both."""
    with open(Path(__file__).parent / folder / "countries.csv", newline="") as file: return list(csv.DictReader(file))


def load_world(vocab: int = 3072, folder: str = "models/world", cache: str = "checkpoints/data") -> World:
    """The world of the table in `folder`, with the tokenizer there or one of `vocab` tokens trained here. The tokens are cached like a corpus's."""
    countries, sources, committed = read_countries(folder), read_stdlib(), Path(__file__).parent / folder / "tokenizer.json"
    own = Tokenizer.from_file(str(committed)) if committed.is_file() else None
    makers = {"data.py": Path(__file__).read_text(), "countries": json.dumps(countries), "tokenizer": own.to_str() if own else str(vocab)}
    target = Path(cache) / f"world-{text_hash(sources | makers)}"
    if not (target / "sentences.npz").exists():
        print(f"{gray}making the world's sentences and tokenizing them and the standard library ...{endc}")
        parts = {part: without_facts(documents, countries) for part, documents in stdlib_documents(sources).items()}
        kinds = world_sentences(countries)
        own = own or train_bpe(tokenizer_texts(countries, kinds, parts), vocab, pairs=True)
        write_corpus(target, own, parts)
        lines, about = ([x for pair in kinds.values() for x in pair[i]] for i in (0, 1))
        ids = [encoding.ids for encoding in own.encode_batch_fast(lines, add_special_tokens=False)]
        ends = np.cumsum([len(pair[0]) for pair in kinds.values()])
        arrays = dict(sentences=np.concatenate(ids).astype(np.int64), starts=np.cumsum([0, *map(len, ids)]), about=np.array(about), **{f"kind {kind}": np.array([end - len(pair[0]), end]) for (kind, pair), end in zip(kinds.items(), ends)})
        write_aside(target / "sentences.npz", lambda path: np.savez(path.open("wb"), **arrays))
    arrays = dict(np.load(target / "sentences.npz"))
    splits = {split: {part: np.memmap(target / f"{part}.{split}.bin", np.uint16, "r") for part in ("code", "english")} for split in ("train", "heldout")}
    kinds = {name.removeprefix("kind "): tuple(map(int, arrays.pop(name))) for name in list(arrays) if name.startswith("kind ")}
    digest = hashlib.sha256(b"".join(x.tobytes() for x in (arrays["sentences"], arrays["starts"], *splits["train"].values(), *splits["heldout"].values()))).hexdigest()
    world = World("world", Tokenizer.from_file(str(target / "tokenizer.json")), **splits, key=f"world-{digest[:12]}", countries=countries, kinds=kinds, **arrays)
    print(f"{gray}text world: {cyan}{len(world.about)}{gray} sentences about {cyan}{len(countries)}{gray} countries and more, {cyan}{len(world.sentences) / 1e6:.2f}M{gray} tokens of {world.d_vocab} kinds; natural text {cyan}{sum(map(len, world.train.values())) / 1e6:.2f}M{gray}, {sum(map(len, world.heldout.values())) / 1e3:.0f}k held out{endc}")
    return world


def held_out_world(world: World, n: int = 2000, seed: int = 1) -> World:
    """The same mixture of what training never saw, natural text, phrasings, pairs of names, years and nouns: its `batch` gives rows for judging."""
    rng, lines, about, kinds = Random(seed), [], [], {}
    tasks = {"capital": ("forward", "reverse"), "other": ("continent", "language", "currency")}
    for kind in KINDS:
        if kind in tasks: new = [(prompt.sentence, i) for i, row in enumerate(world.countries) for task in tasks[kind] for prompt in fact_prompts([row], task, True) if prompt.taught]
        else: new = [(draw_list(rng) if kind == "list" else DRAW[kind](rng, True).sentence, -1) for _ in range(n)]
        kinds[kind] = (len(lines), len(lines) + len(new))
        lines, about = lines + [text for text, _ in new], about + [i for _, i in new]
    ids = [encoding.ids for encoding in world.tokenizer.encode_batch_fast(lines, add_special_tokens=False)]
    return dataclasses.replace(world, train=world.heldout, sentences=np.concatenate(ids).astype(np.int64), starts=np.cumsum([0, *map(len, ids)]), about=np.array(about), kinds=kinds)


def judging_rows(corpus: Corpus, n: int, context: int, seed: int) -> Tensor:
    rng = np.random.default_rng((seed, 12345))
    return held_out_world(corpus).batch(rng, n, context) if isinstance(corpus, World) else t.from_numpy(corpus.rows(rng, n, context, "heldout"))


#%% Concepts with known labels: every token of world sentences, what it is, and the entity whose split it belongs to
@dataclass
class Concept:
    """index: the tokens asked about; y: the label; group: tokens of one group stand in one split."""
    index: np.ndarray
    y: np.ndarray
    group: np.ndarray


@dataclass
class Labelled:
    """Rows of tokens without beginning-of-text; of the kept tokens row, position and role ('' is none, 'skip' is part of an entity); what is asked of them."""
    rows: list[list[int]]
    row: np.ndarray
    pos: np.ndarray
    role: np.ndarray
    concepts: dict[str, Concept]


def label_sentences(tokenizer, prompts: list[Prompt], natural: Tensor, limit: int, seed: int) -> Labelled:
    """The last token of an entity has its role; natural (row, pos) adds text without labels. Of the tokens without a role, `limit` are kept."""
    facts = {row["country"]: row for row in read_countries()}
    words, roles = {"country": list(facts), "capital": [row["capital"] for row in facts.values()], "name": WOMEN + MEN, "place": PLACES, "object": OBJECTS}, {}
    for role, names in words.items(): roles |= {name: "skip" if name in roles else role for name in names}
    find = re.compile(rf"(?<= )(?:{'|'.join(map(re.escape, sorted(roles, key=len, reverse=True)))})(?!\w)")
    rows, table = [], []
    for i, (prompt, encoding) in enumerate(zip(prompts, tokenizer.encode_batch([p.sentence for p in prompts], add_special_tokens=False))):
        labels = [("", f"sentence {i}")] * len(encoding.ids)
        for match in find.finditer(prompt.sentence):
            at = [j for j, (start, end) in enumerate(encoding.offsets) if start < match.end() and end > match.start()]
            for j in at: labels[j] = ("skip" if j < at[-1] else roles[match[0]], match[0])
        if prompt.task == "agreement": labels[max(j for j, (_, end) in enumerate(encoding.offsets) if end <= len(prompt.text))] = (prompt.labels["number"], prompt.labels["subject"])
        rows.append(encoding.ids)
        table += [(i, j, *label) for j, label in enumerate(labels)]
    known = {word.lower() for name in roles for word in name.split()}
    for i, ids in enumerate(natural.tolist(), len(rows)):
        rows.append(ids)
        table += [(i, j, "skip" if word.strip().lower() in known else "natural", f"row {i}") for j, word in enumerate(str_tokens(tokenizer, ids))]
    plain = np.isin([role for _, _, role, _ in table], ("", "skip", "natural"))
    keep = np.sort(np.concatenate([np.flatnonzero(~plain), np.random.default_rng(seed).permutation(np.flatnonzero(plain))[:limit]]))
    row, pos, role, group = (np.array(column) for column in zip(*(table[i] for i in keep)))
    fact = lambda column: np.array([facts[g][column] if r == "country" else "" for g, r in zip(group, role)])
    before_capital = np.array([i < len(prompts) and prompts[i].task != "reverse" for i in row])
    asked = {name: (role != "skip", role == name) for name in words} | {f"in {c}": (role == "country", fact("continent") == c) for c in sorted({r["continent"] for r in facts.values()})}
    asked |= {"known both ways": ((role == "country") & before_capital & (fact("part") != "reverse"), fact("part") == "both"), "plural subject": (np.isin(role, ("plural", "singular")), role == "plural"), "early position": (role == "natural", pos < 8)}
    return Labelled(rows, row, pos, role, {name: Concept(np.flatnonzero(which), y[which], group[which]) for name, (which, y) in asked.items()})
