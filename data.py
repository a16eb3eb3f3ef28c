"""Text -> tokenizer -> memory-mapped batches."""

import ast
import hashlib
import json
import keyword
import os
import shutil
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from utils import BRIEF, cyan, endc, fail, full_name, gray, secret, write_aside

import numpy as np
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
import torch as t
from torch import Tensor
from tqdm import tqdm, trange

BOS_NAMES = ("<|endoftext|>", "<s>", "<|begin_of_text|>", "<bos>", "[CLS]")
HELD_OUT = 16  # one document of 16 is kept out of training


#%% Text: the standard library as code and English, with no sentence in both
NOT_TEXT = {
    "site-packages",
    "test",
    "tests",
    "idlelib",
    "encodings",
    "turtledemo",
    "lib2to3",
    "ensurepip",
    "pydoc_data",
    "__pycache__",
}


def read_stdlib() -> dict[str, str]:
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(path for path in root.rglob("*.py") if not NOT_TEXT & set(path.relative_to(root).parts))
    return {str(path.relative_to(root)): path.read_text(errors="ignore") for path in paths}


def split_docstrings(source: str) -> tuple[str, str]:
    """(source without its docstrings, the docstrings)."""
    lines, docs = source.split("\n"), []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and ast.get_docstring(
            node, clean=False
        ):
            docs.append(ast.get_docstring(node))
            lines[node.body[0].lineno - 1 : node.body[0].end_lineno] = [None] * (
                node.body[0].end_lineno - node.body[0].lineno + 1
            )
    return "\n".join(line for line in lines if line is not None), "\n\n".join(docs)


def stdlib_documents(sources: dict[str, str]) -> dict[str, dict[str, str]]:
    """{'code': {name: text}, 'english': {name: text}}: modules without docstrings; docstrings and the topics of help()."""
    from pydoc_data.topics import topics

    split = {name: split_docstrings(source) for name, source in tqdm(sources.items(), desc="modules", **BRIEF)}
    english = {name: doc for name, (_, doc) in split.items() if len(doc) > 200}
    return {
        "code": {name: code for name, (code, _) in split.items()},
        "english": english | {f"topic {name}": text for name, text in topics.items()},
    }


#%% Text from anywhere else
TEXT_SUFFIXES = {
    ".txt",
    ".md",
    ".rst",
    ".py",
    ".tex",
    ".html",
    ".csv",
    ".json",
    ".jsonl",
    ".c",
    ".h",
    ".js",
    ".rs",
    ".go",
    ".java",
}


def read_files(path: Path) -> dict[str, str]:
    """A file or folder as documents of at most about 4000 characters, cut at blank lines."""
    paths = sorted(p for p in path.rglob("*") if p.suffix in TEXT_SUFFIXES) if path.is_dir() else [path]
    documents = {}
    for file in paths:
        try:
            text = file.read_text()
        except UnicodeDecodeError:
            fail(f"--data {file} is not UTF-8 text")
        pieces, size = [[]], 0
        for paragraph in text.split("\n\n"):
            if size > 4000:
                pieces, size = [*pieces, []], 0
            pieces[-1].append(paragraph)
            size += len(paragraph)
        documents |= {f"{file.name}:{i}": "\n\n".join(piece) for i, piece in enumerate(pieces)}
    if not any(text.strip() for text in documents.values()):
        fail(f"--data {path} holds no text")
    return documents


def hub_documents(name: str, megabytes: float) -> Iterator[tuple[str, str]]:
    """Documents of a hub dataset (or of a folder in a hub dataset's layout), streamed until `megabytes` have come."""
    from datasets import load_dataset

    rows, size = load_dataset(name, split="train", streaming=True, token=secret("HF_TOKEN")), 0
    for i, row in enumerate(rows):
        text = row["text"] if "text" in row else next(value for value in row.values() if isinstance(value, str))
        size += len(text)
        yield f"{name}:{i}", text
        if size > megabytes * 1e6:
            return


#%% Tokenizer: a byte-level BPE trained here, or anyone's
def train_bpe(texts: Iterable[str], vocab: int, pairs: bool = False) -> Tokenizer:
    """pairs: numbers are cut into two-digit tokens, so that a year is a century and a year in it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    if pairs:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(" ?[0-9]{1,2}"), "isolated"), tokenizer.pre_tokenizer]
        )
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab,
            special_tokens=[BOS_NAMES[0]],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    return tokenizer


def load_tokenizer(name: str) -> Tokenizer:
    """A tokenizer.json, a folder that holds one, or a hub name."""
    path = Path(name) / "tokenizer.json" if Path(name).is_dir() else Path(name)
    if path.is_file():
        return Tokenizer.from_file(str(path))
    try:
        return Tokenizer.from_pretrained(full_name(name), token=secret("HF_TOKEN"))
    except Exception as error:
        fail(
            f"cannot load tokenizer {name!r}: no such file or folder, and the hub said: {str(error).splitlines()[0][:200]}"
        )


def bos_id(tokenizer: Tokenizer) -> int:
    ids = [i for name in BOS_NAMES if (i := tokenizer.token_to_id(name)) is not None]
    assert ids, f"the tokenizer has none of {BOS_NAMES}"
    return ids[0]


def to_tokens(tokenizer: Tokenizer, text: str, bos: bool = True) -> Tensor:
    """(1, pos), beginning-of-text first unless bos is False."""
    return t.tensor([[bos_id(tokenizer)] * bos + tokenizer.encode(text, add_special_tokens=False).ids])


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """
    The text of one token, with its space whatever the kind of tokenizer: a SentencePiece piece has '▁' for each, which
    a decoder eats at the head of a text. Padded vocabularies have ids without a token: ''.
    """
    piece = tokenizer.id_to_token(token) or ""
    if "▁" in piece:
        return piece.replace("▁", " ")
    return tokenizer.decode([token], skip_special_tokens=False)


def str_tokens(tokenizer: Tokenizer, tokens: Iterable[int] | Tensor) -> list[str]:
    return [token_text(tokenizer, int(token)) for token in tokens]


def find_tokens(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of the token `text`: exactly it, or with a space before it, or in another case. Ends the program where there is none."""
    vocab = {i: tokenizer.decode([i], skip_special_tokens=False) for i in range(tokenizer.get_vocab_size())}
    if not text.strip():
        found = [i for i, token in vocab.items() if token == text]
    else:
        found = [i for i, token in vocab.items() if token.strip().lower() == text.strip().lower()]
    if found:
        return sorted(found, key=lambda i: vocab[i] != text)
    near = sorted(
        {
            token.strip()
            for token in vocab.values()
            if len(text.strip()) > 1 and token.strip() and text.strip().lower().startswith(token.strip().lower())
        },
        key=len,
    )[-3:]
    fail(
        f"no token reads {text!r} among the {len(vocab)} of this tokenizer"
        + (f"; it is cut into pieces, which begin with one of {near}" if near else "")
    )


def kind_of(token: str) -> str:
    word = token.strip()
    if "\ufffd" in word or word.startswith("<|"):
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

    @property
    def bos(self) -> int:
        return bos_id(self.tokenizer)

    def rows(
        self, rng: np.random.Generator, n: int, ctx: int, split: str = "train", weights: dict[str, float] | None = None
    ) -> np.ndarray:
        """(n, ctx) natural rows: beginning-of-text, then ctx - 1 tokens from a random place. weights: share of each part, default by size."""
        parts = getattr(self, split)
        share = np.array([weights[part] if weights else len(parts[part]) for part in parts], dtype=float)
        if (short := min(len(parts[part]) for part, s in zip(parts, share) if s)) <= ctx:
            fail(
                f"the {split} text of {self.name} has {short} tokens, too few for rows of {ctx}: use more text or a smaller --contexts"
            )
        out = np.full((n, ctx), self.bos, dtype=np.int64)
        for row, part in zip(out, rng.choice(len(share), n, p=share / share.sum())):
            stream = list(parts.values())[part]
            start = rng.integers(len(stream) - ctx + 1)
            row[1:] = stream[start : start + ctx - 1]
        return out

    def batch(
        self,
        rng: np.random.Generator,
        n: int,
        ctx: int,
        natural: float = 0.0,
        shuffled: float = 0.0,
        weights: dict[str, float] | None = None,
    ) -> Tensor:
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
    for name, text in sorted(sources.items()):
        digest.update(f"{name}\0{text}\0".encode())
    return digest.hexdigest()[:12]


def load_corpus(
    data: str = "stdlib",
    vocab: int = 512,
    tokenizer: str | None = None,
    megabytes: float = 100.0,
    cache: str = "checkpoints/data",
) -> Corpus:
    """
    data: 'stdlib', a text file or folder, or a hub dataset name. The tokens are cached under a name that carries a hash of the text
    (of the name and size for a hub dataset), since the standard library differs between patch releases.
    """
    path = Path(data).expanduser()
    if data == "stdlib":
        documents = sources = read_stdlib()
    elif path.exists():
        documents = sources = read_files(path)
    elif data.startswith((".", "/", "~")) or path.suffix in TEXT_SUFFIXES:
        fail(f"--data {data}: no such file or folder")
    else:
        documents, sources = None, {"hub": f"{data} {megabytes}"}
    own = load_tokenizer(tokenizer) if tokenizer else None
    key = f"{path.stem or 'root'}-{text_hash({'tokenizer': own.to_str()})[:6] if own else f'bpe{vocab}'}-{text_hash(sources)}"
    folder = Path(cache) / key
    if not folder.exists():
        print(
            f"{gray}reading {data} and {f'tokenizing it with {tokenizer}' if tokenizer else f'training a byte-level BPE of {vocab} tokens on it'} ...{endc}"
        )
        if data == "stdlib":
            parts = stdlib_documents(sources)
        elif documents is None:
            parts = {"text": fetch(data, megabytes)}
        else:
            parts = {"text": documents}
        write_corpus(
            folder, own or train_bpe((text for part in parts.values() for text in part.values()), vocab), parts
        )
    own = Tokenizer.from_file(str(folder / "tokenizer.json"))
    dtype = np.dtype(json.loads((folder / "meta.json").read_text())["dtype"])
    splits = {
        split: {file.name.split(".")[0]: np.memmap(file, dtype, "r") for file in sorted(folder.glob(f"*.{split}.bin"))}
        for split in ("train", "heldout")
    }
    corpus = Corpus(data, own, **splits, key=key)
    print(
        f"{gray}text {data}: {cyan}{sum(map(len, corpus.train.values())) / 1e6:.2f}M tokens of {corpus.d_vocab} kinds{gray}, {sum(map(len, corpus.heldout.values())) / 1e3:.0f}k held out{endc}"
    )
    return corpus


def fetch(name: str, megabytes: float) -> dict[str, str]:
    try:
        return dict(hub_documents(name, megabytes))
    except Exception as error:
        fail(
            f"--data {name}: no such file or folder, and the hub said: {type(error).__name__}: {str(error).splitlines()[0][:200]}"
        )


def write_corpus(folder: Path, tokenizer: Tokenizer, parts: dict[str, dict[str, str]]) -> None:
    """Documents of each part, joined by beginning-of-text, as <part>.train.bin and <part>.heldout.bin; written aside, then renamed."""
    aside = folder.with_name(f".{folder.name}.{os.getpid()}")
    aside.mkdir(parents=True)
    dtype, bos = np.uint16 if tokenizer.get_vocab_size() < 2**16 else np.uint32, bos_id(tokenizer)
    for part, documents in parts.items():
        texts = list(documents.values())
        ids = [
            np.array([*encoding.ids, bos], dtype)
            for i in trange(0, len(texts), 64, desc=f"tokens of {part}", **BRIEF)
            for encoding in tokenizer.encode_batch_fast(texts[i : i + 64], add_special_tokens=False)
        ]
        held = np.array([zlib.crc32(name.encode()) % HELD_OUT == 0 for name in documents])
        if not held.any():
            held[-1] = True
        if held.all() or len(ids) < 2:  # one document: its last sixteenth is held out
            whole = np.concatenate(ids)
            ids, held = np.split(whole, [len(whole) * (HELD_OUT - 1) // HELD_OUT]), np.array([False, True])
        for split, keep in (("train", ~held), ("heldout", held)):
            np.concatenate([x for x, k in zip(ids, keep) if k]).tofile(aside / f"{part}.{split}.bin")
    tokenizer.save(str(aside / "tokenizer.json"))
    (aside / "meta.json").write_text(json.dumps({"dtype": np.dtype(dtype).name}))
    try:
        aside.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
        shutil.rmtree(aside)  # another process was first


def write_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """tokenizer.json and tokenizer_config.json as transformers reads them; like our training rows, its texts begin with beginning-of-text."""
    bos = tokenizer.id_to_token(bos_id(tokenizer))
    own = Tokenizer.from_str(tokenizer.to_str())
    if own.post_processor is None:
        own.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, bos_id(own))])
    own.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": bos,
                "eos_token": bos,
                "clean_up_tokenization_spaces": False,
            },
            indent=1,
        )
        + "\n"
    )


def write_folder(folder: Path, tensors: dict[str, Tensor], config: dict, tokenizer: Tokenizer | None = None) -> None:
    """An ordinary Hugging Face folder, weights first and whole."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: x.to("cpu").contiguous() for name, x in tensors.items()}
    write_aside(folder / "model.safetensors", lambda path: save_file(tensors, path, {"format": "pt"}))
    (folder / "config.json").write_text(
        json.dumps(config | {"dtype": str(next(iter(tensors.values())).dtype)[6:]}, indent=1) + "\n"
    )
    if tokenizer:
        write_tokenizer(folder, tokenizer)
