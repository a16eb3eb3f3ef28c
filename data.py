"""Text -> tokenizer -> memory-mapped batches."""

import ast
import hashlib
import json
import keyword
import re
import shutil
import sysconfig
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

from utils import (  # first: sets OpenMP's variables before torch is loaded
    BRIEF,
    cyan,
    endc,
    fail,
    TOKENIZER_FILES,
    gray,
    is_bytes,
    model_folder,
    read_json,
    secret,
    write_aside,
    yellow,
)

import numpy as np
import torch as t
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from tqdm import tqdm, trange

OWN_BOS = "<|endoftext|>"  # beginning-of-text of the tokenizers that are trained here
FORMAT = 2  # of cached corpora: another number leaves those of before alone
HELD_OUT = 16  # one document of 16 is kept out of training


#%% Text: the standard library as code and English, with no sentence in both
NOT_TEXT = set(
    "site-packages test tests idlelib encodings turtledemo lib2to3 ensurepip pydoc_data __pycache__".split()
)  # folders of the standard library that are left out


def read_stdlib() -> dict[str, str]:
    """{path in the standard library: source}"""
    root = Path(sysconfig.get_paths()["stdlib"])
    sources = {}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if not NOT_TEXT & set(name.parts):
            sources[str(name)] = path.read_text(encoding="utf-8", errors="ignore")
    return sources


def split_docstrings(source: str) -> tuple[str, str]:
    """(source without its docstrings, the docstrings)."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    lines: list[str | None] = source.split("\n")
    docs = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, documented) or not ast.get_docstring(node, clean=False):
            continue
        docs.append(ast.get_docstring(node))
        first = node.body[0].lineno - 1
        after = node.body[0].end_lineno
        lines[first:after] = [None] * (after - first)  # as many, so that line numbers stay
    code = "\n".join(line for line in lines if line is not None)
    return code, "\n\n".join(docs)


def stdlib_documents(sources: dict[str, str]) -> dict[str, dict[str, str]]:
    """
    {'code': {name: text}, 'english': {name: text}}: modules without docstrings; docstrings and the topics of help().
    """
    from pydoc_data.topics import topics

    code = {}
    english = {}
    for name, source in tqdm(sources.items(), desc="modules", **BRIEF):
        code[name], docs = split_docstrings(source)
        if len(docs) > 200:
            english[name] = docs
    for name, text in topics.items():
        english[f"topic {name}"] = text
    return {"code": code, "english": english}


#%% Text from anywhere else
TEXT_SUFFIXES = set(".txt .md .rst .py .tex .html .csv .json .jsonl .c .h .js .rs .go .java".split())


NOT_READ = set("venv node_modules site-packages __pycache__".split())  # folders of packages; hidden ones too


def read_files(path: Path) -> dict[str, str]:
    """A file or folder as documents of at most about 4000 characters, cut at blank lines; what was left out is said."""
    if path.is_dir():
        files, left_out = text_files(path)
    else:
        files, left_out = {path.name: path}, Counter()
    documents = {}
    characters = 0
    for name, file in files.items():
        text = read_text(file)
        characters += len(text)
        for i, document in enumerate(cut_at_blank_lines(text)):
            documents[f"{name}:{i}"] = document
    if not any(text.strip() for text in documents.values()):
        fail(f"--data {path} holds no text{told(left_out)}")
    if path.is_dir():
        print(f"{gray}{path}: {len(files)} files, {characters:,} characters{told(left_out)}{endc}")
    return documents


def text_files(folder: Path) -> tuple[dict[str, Path], Counter]:
    """{path below the folder: file}, and how many files were left out for which reason."""
    files = {}
    left_out = Counter()
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder)
        if not file.is_file():
            continue
        if any(part.startswith(".") for part in name.parts):
            left_out["hidden"] += 1
        elif NOT_READ & set(name.parts[:-1]):
            left_out["of installed packages"] += 1
        elif file.suffix.lower() not in TEXT_SUFFIXES:
            left_out[f"ending in {file.suffix}" if file.suffix else "without an ending"] += 1
        else:
            files[name.as_posix()] = file
    return files, left_out


def told(left_out: Counter) -> str:
    """; left out: 3 hidden, 2 ending in .png"""
    if not left_out:
        return ""
    reasons = [f"{n:,} {reason}" for reason, n in left_out.most_common(6)]
    if len(left_out) > len(reasons):
        reasons.append("others")
    return f"; left out: {', '.join(reasons)}"


def read_text(file: Path) -> str:
    """UTF-8 whatever the locale, without the byte-order mark that some editors put first."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        fail(f"--data {file} is not UTF-8 text: convert it, for instance by iconv -f latin1 -t utf-8")


def cut_at_blank_lines(text: str, characters: int = 4000) -> list[str]:
    """Pieces that end with the paragraph that takes them over so many characters."""
    pieces: list[list[str]] = [[]]
    size = 0
    for paragraph in text.split("\n\n"):
        if size > characters:
            pieces.append([])
            size = 0
        pieces[-1].append(paragraph)
        size += len(paragraph)
    return ["\n\n".join(piece) for piece in pieces]


def hub_documents(name: str, megabytes: float) -> Iterator[tuple[str, str]]:
    """Documents of a hub dataset (or of a folder in a hub dataset's layout), streamed until `megabytes` have come."""
    from datasets import load_dataset

    rows = load_dataset(name, split="train", streaming=True, token=secret("HF_TOKEN"))
    size = 0
    for i, row in enumerate(rows):
        strings = (value for value in row.values() if isinstance(value, str))
        text = row["text"] if "text" in row else next(strings)
        size += len(text)
        yield f"{name}:{i}", text
        if size > megabytes * 1e6:
            return


def fetch(name: str, megabytes: float) -> dict[str, str]:
    """hub_documents; what goes wrong with the hub gets one line."""
    try:
        return dict(hub_documents(name, megabytes))
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
        fail(f"--data {name}: no such file or folder, and the hub said: {reason}")


#%% Tokenizer: a byte-level BPE trained here, or anyone's
def train_bpe(texts: Iterable[str], vocab: int, pairs: bool = False) -> Tokenizer:
    """
    Its texts begin with OWN_BOS. pairs: numbers are cut into two-digit tokens, so that a year is a century and a year
    in it.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if pairs:
        two_digits = pre_tokenizers.Split(Regex(" ?[0-9]{1,2}"), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([two_digits, tokenizer.pre_tokenizer])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[OWN_BOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((piece for text in texts for piece in cut_long_words(text)), trainer)
    put_first(tokenizer, tokenizer.token_to_id(OWN_BOS))
    return tokenizer


LONG_WORD = re.compile(r"\w{256}|[^\w\s]{256}|\s{256}")


def cut_long_words(text: str) -> list[str]:
    """
    The text in pieces, cut within words of more than 256 characters alone (DNA, base64): the time that BPE's training
    takes grows with the square of a word's length.
    """
    cuts = [0, *(match.end() for match in LONG_WORD.finditer(text)), len(text)]
    return [text[start:end] for start, end in pairwise(cuts)]


def tokenizer_folder(name: str | Path) -> Path:
    """Where the tokenizer's files lie: of a tokenizer.json its folder, else the folder or hub model of that name."""
    path = Path(name).expanduser()
    return path.parent if path.is_file() else model_folder(name, TOKENIZER_FILES)


def load_tokenizer(name: str | Path, bos: bool | None = None) -> Tokenizer:
    """
    A tokenizer.json, a folder, or a hub name. bos (--bos, --no-bos): whether a beginning-of-text token stands before
    every text; None: as the files say.
    """
    folder = tokenizer_folder(name)
    path = Path(name).expanduser()
    if not path.is_file():
        path = folder / "tokenizer.json"
    if path.is_file():
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:
            fail(f"{path} is no tokenizer: {error}")
    else:
        tokenizer = convert_tokenizer(folder)
    tokenizer.no_truncation()  # what a use before was saved with is not the tokenizer's
    tokenizer.no_padding()
    choose_bos(tokenizer, folder, bos)
    return tokenizer


def unpadded(theirs) -> Tokenizer:
    """A copy of a transformers tokenizer's own, which neither pads nor cuts."""
    tokenizer = Tokenizer.from_str(theirs.backend_tokenizer.to_str())
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def convert_tokenizer(folder: Path) -> Tokenizer:
    """From the files that came before tokenizer.json (OPT's vocab.json and merges.txt, SentencePiece), by transformers."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder).backend_tokenizer
    except Exception as error:
        reason = str(error).strip().splitlines()[0][:200]
        fail(
            f"no tokenizer.json in {folder} (tokenizer.save_pretrained puts it there), and transformers reads no other "
            f"tokenizer there: {reason}"
        )


#%% Beginning-of-text and the tokens that end a text: what a model's own files say
def bos_id(tokenizer: Tokenizer) -> int | None:
    """The token that stands before every text: what the tokenizer itself puts there (its post-processor), or None."""
    bare = tokenizer.encode("a", add_special_tokens=False).ids
    own = tokenizer.encode("a", add_special_tokens=True).ids
    places = [i for i in range(len(own)) if own[i : i + len(bare)] == bare]
    before = own[: places[0]] if places else []
    if len(before) > 1:
        fail(
            f"this tokenizer puts {len(before)} tokens before a text, which is not read here: choose --bos or --no-bos"
        )
    return before[0] if before else None


def put_first(tokenizer: Tokenizer, bos: int | None) -> None:
    """Make the tokenizer put this token before every text, and nothing else."""
    tokenizer.post_processor = None
    if bos is not None:
        name = tokenizer.id_to_token(bos)
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{name} $A", special_tokens=[(name, bos)])


def choose_bos(tokenizer: Tokenizer, folder: Path, asked: bool | None) -> None:
    """
    Make the tokenizer put first what the model reads. That is what it puts by itself, or its bos_token where
    tokenizer_config.json has add_bos_token; that there is a bos_token is not enough (Pythia, Qwen). asked overrides.
    """
    if asked is False:
        put_first(tokenizer, None)
        return
    declared = declared_token(tokenizer, folder, "bos_token")
    if asked and declared is not None:
        put_first(tokenizer, declared)
        return
    if bos_id(tokenizer) is not None:
        return
    if asked and declared is None:
        fail(f"the files in {folder} name no beginning-of-text token, which --bos or this SAE asks for: use --no-bos")
    if asked or read_json(folder / "tokenizer_config.json").get("add_bos_token"):
        put_first(tokenizer, declared)


def declared_token(tokenizer: Tokenizer, folder: Path, name: str) -> int | None:
    """The token that the files call bos_token or eos_token, or None."""
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        said = read_json(folder / file)
        if name in said:
            token = said[name]
            if isinstance(token, dict):
                token = token["content"]
            return None if token is None else tokenizer.token_to_id(token)
    for file in ("generation_config.json", "config.json"):
        token = read_json(folder / file).get(f"{name}_id")
        if token is not None:
            return token[0] if isinstance(token, list) else token
    return None


def end_ids(tokenizer: Tokenizer, folder: Path) -> list[int]:
    """The tokens by which a model ends its text or its turn."""
    said = read_json(folder / "generation_config.json").get("eos_token_id")
    ends = said if isinstance(said, list) else [said]
    ends = [*ends, declared_token(tokenizer, folder, "eos_token")]
    return sorted({i for i in ends if i is not None})


def refuse_empty(prompt: str) -> None:
    """Said before anything is trained or opened."""
    if not prompt.strip():
        fail("--prompt is empty: give a few words, such as --prompt 'The capital of Japan is'")


def to_tokens(tokenizer: Tokenizer, text: str, prepend_bos: bool | None = None) -> Tensor:
    """(1, pos), beginning-of-text first where the tokenizer puts one, or as prepend_bos says."""
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    bos = bos_id(tokenizer)
    if prepend_bos and bos is None:
        fail("this tokenizer puts no beginning-of-text token first: open the model with --bos, or use put_first")
    if bos is not None and prepend_bos is not False:
        ids = [bos, *ids]
    return t.tensor([ids])


def byte_letters() -> dict[str, int]:
    """{letter: the byte that GPT-2's tokenizer writes as it}: itself where it can be seen, else from 256 on."""
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    unseen = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(256 + i): byte for i, byte in enumerate(unseen)}


BYTE_LETTERS = byte_letters()


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """
    The text of one token, with its space whatever the kind of tokenizer: a SentencePiece piece has '▁' for each, which
    a decoder eats at the head of a text. A part of a character is its bytes, '<0xE4><0xB8>', so that parts stay apart.
    Padded vocabularies have ids without a token: ''.
    """
    piece = tokenizer.id_to_token(token) or ""
    if "▁" in piece:
        return piece.replace("▁", " ")
    text = tokenizer.decode([token], skip_special_tokens=False)
    if "\ufffd" not in text:
        return text
    if is_bytes(piece):  # as SentencePiece writes it
        return piece
    return "".join(f"<0x{BYTE_LETTERS[letter]:02X}>" for letter in piece if letter in BYTE_LETTERS) or text


def str_tokens(tokenizer: Tokenizer, tokens: Iterable[int] | Tensor) -> list[str]:
    return [token_text(tokenizer, int(token)) for token in tokens]


def text_of(tokenizer: Tokenizer, ids: list[int]) -> str:
    """The text of tokens that follow each other, with the space before the first; halves of a character become one."""
    text = tokenizer.decode(ids, skip_special_tokens=False)
    if ids and token_text(tokenizer, ids[0]).startswith(" ") and not text.startswith(" "):
        return f" {text}"
    return text


def find_tokens(tokenizer: Tokenizer, text: str) -> list[int]:
    """
    Ids of the token `text`: exactly it, or with a space before it, or in another case. Ends the program where there is
    none.
    """
    vocab = {i: token_text(tokenizer, i) for i in range(tokenizer.get_vocab_size())}
    word = text.strip().lower()
    if word:
        found = [i for i, token in vocab.items() if token.strip().lower() == word]
    else:
        found = [i for i, token in vocab.items() if token == text]
    if found:
        return sorted(found, key=lambda i: vocab[i] != text)  # exactly it first
    beginnings = set()
    if len(text.strip()) > 1:
        stripped = {token.strip() for token in vocab.values()}
        beginnings = {token for token in stripped if token and word.startswith(token.lower())}
    near = sorted(beginnings, key=len)[-3:]
    pieces = f"; it is cut into pieces, which begin with one of {near}" if near else ""
    fail(f"no token reads {text!r} among the {len(vocab)} of this tokenizer{pieces}")


def kind_of(token: str) -> str:
    word = token.strip()
    if is_bytes(word) or "\ufffd" in word or word.startswith("<|"):
        return "byte or special"
    if not word:
        return "white space"
    if keyword.iskeyword(word):
        return "Python keyword"
    if word.isdigit():
        return "number"
    if not any(c.isalnum() for c in word):
        return "punctuation"
    if word[0].isupper():
        return "capitalised"
    return "word after a space" if token[0] == " " else "word or piece"


#%% Corpus: memory-mapped tokens in parts (code, english ...), each with a held-out split
@dataclass
class Corpus:
    name: str
    tokenizer: Tokenizer
    train: dict[str, np.ndarray]
    heldout: dict[str, np.ndarray]
    key: str  # names the text by its hash, and the tokenizer

    @property
    def d_vocab(self) -> int:
        return self.tokenizer.get_vocab_size()

    @cached_property
    def bos(self) -> int | None:
        return bos_id(self.tokenizer)

    def rows(
        self,
        rng: np.random.Generator,
        n: int,
        ctx: int,
        split: str = "train",
        weights: dict[str, float] | None = None,
    ) -> np.ndarray:
        """
        (n, ctx) natural rows: beginning-of-text where there is one, then tokens from a random place. weights: share of
        each part, default by size.
        """
        parts = getattr(self, split)
        streams = list(parts.values())
        if weights:
            share = np.array([weights[part] for part in parts], dtype=float)
        else:
            share = np.array([len(stream) for stream in streams], dtype=float)
        shortest = min(len(stream) for stream, s in zip(streams, share) if s)
        if shortest <= ctx:
            fail(
                f"the {split} text of {self.name} has {shortest} tokens, too few for rows of {ctx}: use more text or a "
                "smaller --contexts"
            )
        rows = np.empty((n, ctx), dtype=np.int64)
        first = 0 if self.bos is None else 1
        rows[:, :first] = self.bos or 0
        chosen = rng.choice(len(share), n, p=share / share.sum())
        for row, part in zip(rows, chosen):
            stream = streams[part]
            start = rng.integers(len(stream) - ctx + 1)
            row[first:] = stream[start : start + ctx - first]
        return rows

    def batch(
        self,
        rng: np.random.Generator,
        n: int,
        ctx: int,
        natural: float = 0.0,
        shuffled: float = 0.0,
        weights: dict[str, float] | None = None,
    ) -> Tensor:
        """
        Training rows (n, ctx), of which shares `natural` and `shuffled` repeat a snippet of themselves (the latter in
        shuffled order).
        """
        rows = self.rows(rng, n, ctx, weights=weights)
        kind = rng.random(n)
        to_shuffle = kind < shuffled
        to_repeat = kind < natural + shuffled
        rows[to_shuffle, 1:] = rng.permuted(rows[to_shuffle, 1:], axis=1)
        return t.from_numpy(repeat_snippets(rng, rows, to_repeat))


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
    """12 digits, of names and texts."""
    digest = hashlib.sha256()
    for name, text in sorted(sources.items()):
        digest.update(f"{name}\0{text}\0".encode())
    return digest.hexdigest()[:12]


def load_corpus(
    data: str = "stdlib",
    vocab: int = 512,
    tokenizer: str | None = None,
    megabytes: float = 100.0,
    cache: str = "checkpoints/data",
    bos: bool | None = None,
) -> Corpus:
    """
    data: 'stdlib', a text file or folder, or a hub dataset name. The tokens are cached under a name that carries a hash
    of the text (of the name and size for a hub dataset), since the standard library differs between patch releases.
    bos (--bos, --no-bos): whether rows begin with beginning-of-text; None: as the tokenizer's files say.
    """
    sources = read_sources(data, megabytes)
    own = load_tokenizer(tokenizer, bos) if tokenizer else None
    separator = separator_of(own, tokenizer_folder(tokenizer)) if own else None
    key = corpus_key(data, sources, own, vocab, separator)
    folder = Path(cache) / key
    if not is_whole(folder):
        how = f"tokenizing it with {tokenizer}" if tokenizer else f"training a byte-level BPE of {vocab} tokens on it"
        print(f"{gray}reading {data} and {how} ...{endc}")
        parts = read_parts(data, sources, megabytes)
        if own is None:
            own = train_bpe((text for part in parts.values() for text in part.values()), vocab)
            separator = bos_id(own)
        write_corpus(folder, own, parts, separator)
    corpus = open_corpus(data, key, folder)
    trained_on = sum(map(len, corpus.train.values())) / 1e6
    held_out = sum(map(len, corpus.heldout.values())) / 1e3
    print(
        f"{gray}text {data}: {cyan}{trained_on:.2f}M tokens of {corpus.d_vocab} kinds{gray}, "
        f"{held_out:.0f}k held out{endc}"
    )
    return corpus


def read_sources(data: str, megabytes: float) -> dict[str, str]:
    """The texts whose hash names the cache; of a hub dataset, which is read only when it is needed, its name and size."""
    path = Path(data).expanduser()
    if data == "stdlib":
        return read_stdlib()
    if path.exists():
        return read_files(path)
    if data.startswith((".", "/", "~")) or path.suffix in TEXT_SUFFIXES:
        fail(f"--data {data}: no such file or folder")
    return {"hub": f"{data} {megabytes}"}


def separator_of(tokenizer: Tokenizer, folder: Path) -> int | None:
    """What stands between two documents: the bos_token of the files, or else their eos_token, or nothing."""
    bos = bos_id(tokenizer)
    for name in ("bos_token", "eos_token"):
        if bos is None:
            bos = declared_token(tokenizer, folder, name)
    return bos


def corpus_key(
    data: str,
    sources: dict[str, str],
    tokenizer: Tokenizer | None,
    vocab: int,
    separator: int | None = None,
) -> str:
    """Names the text and the tokenizer; without one, the byte-level BPE of `vocab` tokens that is trained on the text."""
    stem = Path(data).expanduser().stem or "root"
    tokenized_by = f"bpe{vocab}"
    if tokenizer is not None:
        tokenized_by = text_hash({"tokenizer": tokenizer.to_str(), "separator": str(separator)})[:6]
    return f"{stem}-{tokenized_by}-{text_hash(sources)}-{FORMAT}"


def read_parts(data: str, sources: dict[str, str], megabytes: float) -> dict[str, dict[str, str]]:
    """{part: {name: document}}"""
    if data == "stdlib":
        return stdlib_documents(sources)
    if Path(data).expanduser().exists():
        return {"text": sources}
    return {"text": fetch(data, megabytes)}


def open_corpus(name: str, key: str, folder: Path) -> Corpus:
    """What write_corpus wrote and is_whole has checked, memory-mapped."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    dtype = np.dtype(json.loads((folder / "meta.json").read_text())["dtype"])
    splits: dict[str, dict[str, np.ndarray]] = {"train": {}, "heldout": {}}
    for split, parts in splits.items():
        for file in sorted(folder.glob(f"*.{split}.bin")):
            part = file.name.split(".")[0]
            is_empty = file.stat().st_size == 0  # which cannot be mapped
            parts[part] = np.zeros(0, dtype) if is_empty else np.memmap(file, dtype, "r")
    return Corpus(name, tokenizer, **splits, key=key)


def is_whole(folder: Path) -> bool:
    """Whether a cached corpus is all there, each file as long as it was written; else it is made again."""
    try:
        sizes = json.loads((folder / "meta.json").read_text())["sizes"]
        Tokenizer.from_file(str(folder / "tokenizer.json"))
        whole = all((folder / name).stat().st_size == size for name, size in sizes.items())
    except Exception:  # tokenizers raises nothing narrower
        whole = False
    if folder.exists() and not whole:
        print(f"{yellow}{folder} is not whole (or of an older version): it is made again{endc}")
    return whole


def sizes_of(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_size for file in sorted(folder.iterdir())}


def write_corpus(
    folder: Path,
    tokenizer: Tokenizer,
    parts: dict[str, dict[str, str]],
    separator: int | None,
) -> None:
    """
    Documents of each part, joined by the separator (beginning-of-text), as <part>.train.bin and <part>.heldout.bin;
    written aside, then renamed.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        aside.chmod(0o755)  # others may read it
        try:
            fill_corpus(aside, tokenizer, parts, separator)
            put_in_place(aside, folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)  # of a run that was cut off, or whose disk is full
    except OSError as error:
        fail(
            f"the tokens could not be written to {folder}: {error.strerror or error}: free some space, or go elsewhere"
        )


def put_in_place(aside: Path, folder: Path) -> None:
    """Another process may have been first, whose files are as good; those that are not whole make way."""
    if folder.exists() and is_whole(folder):
        return
    if folder.exists():
        broken = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        folder.rename(broken / "old")  # those who still read it can go on
        shutil.rmtree(broken, ignore_errors=True)
    try:
        aside.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise


def fill_corpus(aside: Path, tokenizer: Tokenizer, parts: dict[str, dict[str, str]], separator: int | None) -> None:
    dtype = np.uint16 if tokenizer.get_vocab_size() < 2**16 else np.uint32
    for part, documents in parts.items():
        train, heldout = split_documents(documents, tokenize(tokenizer, documents, part, dtype, separator))
        (aside / f"{part}.train.bin").write_bytes(np.concatenate(train).tobytes())
        (aside / f"{part}.heldout.bin").write_bytes(np.concatenate(heldout).tobytes())
    tokenizer.save(str(aside / "tokenizer.json"))
    meta = {"dtype": np.dtype(dtype).name, "sizes": sizes_of(aside)}
    (aside / "meta.json").write_text(json.dumps(meta))


def tokenize(
    tokenizer: Tokenizer,
    documents: dict[str, str],
    part: str,
    dtype: type,
    separator: int | None,
) -> list[np.ndarray]:
    """The tokens of each document, the separator last."""
    last = [] if separator is None else [separator]
    texts = list(documents.values())
    ids = []
    for i in trange(0, len(texts), 64, desc=f"tokens of {part}", **BRIEF):
        encodings = tokenizer.encode_batch_fast(texts[i : i + 64], add_special_tokens=False)
        ids += [np.array([*encoding.ids, *last], dtype) for encoding in encodings]
    return ids


def split_documents(names: Iterable[str], ids: list[np.ndarray]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """(train, held out): one of HELD_OUT documents by its name, the last if that is none."""
    held = np.array([zlib.crc32(name.encode()) % HELD_OUT == 0 for name in names])
    if not held.any():
        held[-1] = True
    if held.all() or len(ids) < 2:  # one document: its last sixteenth is held out
        whole = np.concatenate(ids)
        train, heldout = np.split(whole, [len(whole) * (HELD_OUT - 1) // HELD_OUT])
        return [train], [heldout]
    train = [document for document, is_held in zip(ids, held) if not is_held]
    heldout = [document for document, is_held in zip(ids, held) if is_held]
    return train, heldout


def write_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """tokenizer.json and tokenizer_config.json as transformers reads them; what begins a text also ends it."""
    bos = bos_id(tokenizer)
    name = None if bos is None else tokenizer.id_to_token(bos)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": name,
        "eos_token": name,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")


def write_folder(
    folder: Path,
    tensors: dict[str, Tensor],
    config: dict,
    tokenizer: Tokenizer | None = None,
) -> None:
    """An ordinary Hugging Face folder, weights first and whole."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: x.to("cpu").contiguous() for name, x in tensors.items()}
    write_aside(folder / "model.safetensors", lambda path: save_file(tensors, path, {"format": "pt"}))
    first = next(iter(tensors.values()))
    config = config | {"dtype": str(first.dtype).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    if tokenizer:
        write_tokenizer(folder, tokenizer)
