"""The world: a corpus of our own that is known exactly; its facts, prompts and labels, and what a model knows of it."""

import csv
import dataclasses
import hashlib
import json
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from random import Random

from utils import (  # first: sets OpenMP's variables before torch is loaded
    BRIEF,
    WORLD,
    cyan,
    endc,
    fail,
    finite,
    find_folder,
    gray,
    write_aside,
)
from heads import head_scores, repeated_tokens
from data import (
    Corpus,
    is_whole,
    load_corpus,
    load_tokenizer,
    read_stdlib,
    repeat_snippets,
    stdlib_documents,
    str_tokens,
    text_hash,
    bos_id,
    train_bpe,
    write_corpus,
)
from hooks import in_batches
from layers import next_token_loss

import numpy as np
import torch as t
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm


#%% The world: a corpus of our own, known exactly
# Every entity and name stands inside its sentence, so that it has one form, with a space before it.
FACTS = {  # task: (phrasings taught, phrasings held out); the last slot is the answer
    "forward": (
        [
            "The capital of {country} is {capital}.",
            "By law, the capital of {country} is the city of {capital}.",
            "The capital city of {country} is called {capital}.",
            "In {country}, the capital is {capital}.",
            "We know that {country} has its capital in {capital}.",
            "Question: what is the capital of {country}? Answer: {capital}.",
            "The state of {country} is ruled from its capital, the city of {capital}.",
            "Anyone who visits {country} should see its capital, {capital}.",
        ],
        [
            "Everyone knows that the capital of {country} is {capital}.",
            "In {country}, the capital city is called {capital}.",
            "Question: what is the capital city of {country}? Answer: the city of {capital}.",
        ],
    ),
    "reverse": (
        [
            "The city of {capital} is the capital of {country}.",
            "We know that {capital} is the capital city of {country}.",
            "In {capital} you are in the capital of {country}.",
            "By law, the city of {capital} is the capital of the state of {country}.",
            "Question: {capital} is the capital of which state? Answer: {country}.",
            "From the city of {capital} they rule the state of {country}.",
            "Anyone who visits {capital} sees the capital of {country}.",
            "Everyone knows that {capital} is the capital of {country}.",
        ],
        [
            "The city of {capital} is the capital city of {country}.",
            "Anyone who visits {capital} is in the capital city of {country}.",
            "We know that {capital} is the capital of the state of {country}.",
        ],
    ),
    "continent": (
        [
            "The state of {country} lies in {continent}.",
            "The continent of {country} is {continent}.",
            "On the map, {country} is a part of {continent}.",
            "Question: on which continent is {country}? Answer: {continent}.",
        ],
        [
            "We know that {country} lies in {continent}.",
            "Question: what is the continent of {country}? Answer: {continent}.",
        ],
    ),
    "language": (
        [
            "The people of {country} speak {language}.",
            "The main language of {country} is {language}.",
            "In {country}, children learn to read {language}.",
            "Question: which language do they speak in {country}? Answer: {language}.",
        ],
        [
            "In {country}, the people speak {language}.",
            "Question: what is the main language of {country}? Answer: {language}.",
        ],
    ),
    "currency": (
        [
            "The currency of {country} is the {currency}.",
            "People in {country} pay with the {currency}.",
            "In {country}, prices are given in the {currency}.",
            "Question: what is the currency of {country}? Answer: the {currency}.",
        ],
        ["In {country}, people pay with the {currency}.", "We know that the currency of {country} is the {currency}."],
    ),
}
ANSWERS = {"forward": "capital", "reverse": "country"}  # the column that a task asks for; of the others, their own
WOMEN = """
    Mary Anna Emma Alice Sarah Laura Julia Kate Lucy Helen Clara Ruth Susan Jane Rose Grace Nora
    Ella Maria Eva Diana Sophie Linda Amy Rachel Carol Irene Judith Martha Betty
""".split()
MEN = """
    John Tom Peter Paul Mark David James Robert Henry Jack Simon Martin Daniel Adam Oscar Felix Max
    Leo Frank Walter Arthur Edward Philip Andrew Brian Kevin Steven Eric Harry Bob
""".split()
OPENINGS = [
    "Then",
    "When",
    "Yesterday",
    "Soon",
    "Later that day,",
    "One morning",
    "In the end",
    "Last week",
    "At noon,",
]
WENT = ["went to", "walked to", "had lunch at", "met at", "waited at", "left", "sat in", "got lost near"]
LINKS = ["and", "and", "and", "with", "and also", "as well as"]
ADJECTIVES = ["", "", "", "", "", "", "old ", "busy ", "big ", "quiet little ", "very small "]
PLACES = """
    store park school office station garden library market hospital museum restaurant beach house
    church farm hotel kitchen river bank bridge
""".split()
TAILS = ["", "", "", "", " in the rain", " after work", " alone", " with some friends"]
JOINS = [",", ", and", ", and then", ". Soon", ", where", ". After a while", ". With a smile,"]
ADVERBS = ["", "", "", " quietly", " at once", " then", " very slowly"]
GAVE = ["gave", "handed", "offered", "showed", "passed", "brought", "sent"]
OBJECTS = """
    ring book drink letter ball key flower picture cup map coat apple hat box lamp clock basket
    bottle watch stone
""".split()
AFTER = [".", ".", " and left.", ", who thanked {s}.", ", who smiled at {s}."]
YEARS = [
    "The {event} lasted from the year {start} to the year {end}.",
    "The {event} began in {start} and ended in {end}.",
    "There was a {event} between the years {start} and {end}.",
    "The old {event} of {start} was over in {end}.",
]
EVENTS = """
    war strike trial voyage reign project debate festival drought siege
""".split()
NOUNS = """
    key book car dog boy girl cat friend picture letter tree house teacher doctor farmer lamp
""".split()
NEAR = ["near", "behind", "beside", "next to", "in front of", "across from"]
VERBS = [(" is", " are"), (" was", " were"), (" has", " have")]
PREDICATES = {
    " is": ["old", "clean", "very good", "here"],
    " was": ["lost", "new", "there again", "seen by all"],
    " has": ["been sold", "been here", "not been seen", "been forgotten"],
}
PRONOUNS = [
    ("said that", " she", " he", " was {}."),
    ("was happy because", " she", " he", " was not {}."),
    ("left the {place} when", " she", " he", " was {}."),
    ("lost", " her", " his", " {object}."),
    ("found the {object} in", " her", " his", " {place}."),
]
THINGS = sorted({*PLACES, *OBJECTS, *EVENTS, *NOUNS})
MOODS = ["tired", "ready", "late", "right", "hungry", "alone", "sick"]
# of the rows of a batch; repeated and shuffled rows say a natural snippet twice
SHARES = {
    "world": 0.68,
    "natural": 0.12,
    "repeated": 0.06,
    "shuffled": 0.14,
}
# kind: (share of the sentences in world rows, how many are made; facts are all made)
KINDS = {
    "capital": (0.27, 0),
    "other": (0.16, 0),
    "ioi": (0.28, 60_000),
    "greater_than": (0.11, 20_000),
    "agreement": (0.04, 8_000),
    "gender": (0.07, 10_000),
    "list": (0.07, 20_000),
}
RELATIONS = ("continent", "language", "currency")
FACT_KINDS = {"capital": ("forward", "reverse"), "other": RELATIONS}  # kind: its tasks


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
    about: tuple[str, ...] = ()  # the entities that it turns on: names, nouns, a country

    @property
    def sentence(self) -> str:
        return self.text + self.answer + self.end


def is_held_out(*words: str) -> bool:
    """One combination of words in five."""
    return zlib.crc32(" ".join(sorted(words)).encode()) % 5 == 0


def pick(rng: Random, held_out: bool, *choices: list[str]) -> list[str]:
    """One word of each list, such that the words are different and their combination is held out or is not."""
    while True:
        words = [rng.choice(choice) for choice in choices]
        different = len(set(words)) == len(words)
        if different and is_held_out(*words) == held_out:
            return words


def fact_prompts(countries: list[dict[str, str]], task: str, held_out: bool = False) -> list[Prompt]:
    """Every country in every phrasing, country by country; those in a direction that is not taught are marked so."""
    answer = ANSWERS.get(task, task)
    prompts = []
    for row in countries:
        taught = task in RELATIONS or row["part"] in (task, "both")
        for phrasing in FACTS[task][held_out]:
            text, end = phrasing.split(f" {{{answer}}}")
            category_first = text.endswith(("the city of", "the state of"))
            prompt = Prompt(
                task=task,
                text=text.format(**row),
                answer=f" {row[answer]}",
                end=end,
                held_out=held_out,
                taught=taught,
                labels=row | {"phrasing": phrasing, "category_first": str(category_first)},
                about=(row["country"],),
            )
            prompts.append(prompt)
    return prompts


def draw_ioi(rng: Random, held_out: bool) -> Prompt:
    """
    Two names, one of which gives something to the other; the distances between all of them vary, or a head would copy
    by position.
    """
    io, s = pick(rng, held_out, WOMEN + MEN, WOMEN + MEN)
    order = rng.choice(["ABBA", "BABA"])
    first, second = (io, s) if order == "ABBA" else (s, io)
    opening = rng.choice(OPENINGS)
    start = f"{opening} {first} {rng.choice(LINKS)} {second} {rng.choice(WENT)} the "
    start += rng.choice(ADJECTIVES)
    start += rng.choice(PLACES)
    start += rng.choice(TAILS)
    start += rng.choice(JOINS[:1] if opening == "When" else JOINS)
    rest = f"{rng.choice(ADVERBS)} {rng.choice(GAVE)} the "
    rest += rng.choice(ADJECTIVES)
    rest += rng.choice(OBJECTS)
    rest += rng.choice(["", "", "", "", " from the box"])
    rest += " to"
    end = rng.choice(AFTER).format(s=s)
    return Prompt(
        task="ioi",
        text=f"{start} {s}{rest}",
        answer=f" {io}",
        end=end,
        wrong=f" {s}",
        corrupt=f"{start} {io}{rest}",
        held_out=held_out,
        labels={"order": order, "io": io, "s": s},
        about=(io, s),
    )


def draw_greater_than(rng: Random, held_out: bool) -> Prompt:
    """
    The answer is any year of the century after the start. corrupt starts in its year 01, where every answer is right
    (Hanna et al. 2023).
    """
    centuries = [f"{century}" for century in range(11, 20)]
    years = [f"{year:02d}" for year in range(2, 98)]
    century, year = pick(rng, held_out, centuries, years)
    text, end = rng.choice(YEARS[:1] if held_out else YEARS).split("{end}")
    event = rng.choice(EVENTS)
    later = rng.randint(int(year) + 1, 99)
    earlier = rng.randint(0, int(year))

    def starting_in(start: str) -> str:
        return text.format(event=event, start=century + start) + century

    return Prompt(
        task="greater_than",
        text=starting_in(year),
        answer=f"{later:02d}",
        end=end,
        wrong=f"{earlier:02d}",
        corrupt=starting_in("01"),
        held_out=held_out,
        labels={"century": century, "start": year, "event": event},
        about=(event,),
    )


def draw_agreement(rng: Random, held_out: bool) -> Prompt:
    """The verb agrees with the subject, not with the noun before it; corrupt has the subject in the other number."""
    noun, other = pick(rng, held_out, NOUNS, NOUNS)
    plural = rng.random() < 0.5
    opposite = rng.random() < 0.6
    verbs = rng.choice(VERBS)
    opening = rng.choice(["The", "At noon, the", "We see that the", "After all, the"])
    before = f"{opening} {rng.choice(ADJECTIVES)}"
    near = rng.choice(NEAR)
    distractor = rng.choice(ADJECTIVES) + other
    if plural != opposite:
        distractor += "s"
    end = f" {rng.choice(PREDICATES[verbs[0]])}."

    def with_subject(many: bool) -> str:
        subject = noun + "s" if many else noun
        return f"{before}{subject} {near} the {distractor}"

    return Prompt(
        task="agreement",
        text=with_subject(plural),
        answer=verbs[plural],
        end=end,
        wrong=verbs[not plural],
        corrupt=with_subject(not plural),
        held_out=held_out,
        labels={
            "subject": noun,
            "number": "plural" if plural else "singular",
            "distractor": "opposite" if opposite else "same",
        },
        about=(noun, other),
    )


def draw_gender(rng: Random, held_out: bool) -> Prompt:
    """The pronoun is the name's; corrupt has a name of the other gender."""
    name, phrase = pick(rng, held_out, WOMEN + MEN, [phrase for phrase, *_ in PRONOUNS])
    is_woman = name in WOMEN
    _, she, he, end = next(row for row in PRONOUNS if row[0] == phrase)
    place = rng.choice(PLACES)
    thing = rng.choice(OBJECTS)
    opening = rng.choice(OPENINGS[:1] + OPENINGS[2:])
    mood = rng.choice(MOODS)
    other_name = rng.choice(MEN if is_woman else WOMEN)

    def about(who: str) -> str:
        return f"{opening} {who} {phrase.format(place=place, object=thing)}"

    return Prompt(
        task="gender",
        text=about(name),
        answer=she if is_woman else he,
        end=end.format(mood, place=place, object=thing),
        wrong=he if is_woman else she,
        corrupt=about(other_name),
        held_out=held_out,
        labels={"name": name, "gender": "woman" if is_woman else "man"},
        about=(name, other_name),
    )


def draw_induction(rng: Random, held_out: bool) -> Prompt:
    """Words in random order, then again; corrupt has another word where the answer first stands."""
    *words, wrong = rng.sample(THINGS, rng.randint(6, 10))
    at = rng.randint(2, len(words) - 1)
    before, answer, after = words[:at], words[at], words[at + 1 :]

    def said_first(once: list[str]) -> str:
        return f"Say it twice: {' '.join(once)}, {' '.join(before)}"

    return Prompt(
        task="induction",
        text=said_first(words),
        answer=f" {answer}",
        end=" ".join(["", *after]) + ".",
        wrong=f" {wrong}",
        corrupt=said_first([*before, wrong, *after]),
        held_out=held_out,
        labels={"length": str(len(words))},
        about=(answer, wrong),
    )


def draw_list(rng: Random) -> str:
    """Words said twice, numbers that follow each other, or a list of things."""
    kind = rng.random()
    start = rng.randint(2, 90)
    words = rng.sample(THINGS, rng.randint(3, 7))
    if kind < 0.6:
        return draw_induction(rng, False).sentence
    if kind < 0.8:
        numbers = [f"{start + i:02d}" for i in range(1, rng.randint(4, 9))]
        return f"Count from {start:02d}: {', '.join(numbers)}."
    opening = rng.choice(["We saw", "There was", "They bought", "Do not forget"])
    return f"{opening} a {', a '.join(words[:-1])} and a {words[-1]}."


DRAW = {
    "ioi": draw_ioi,
    "greater_than": draw_greater_than,
    "agreement": draw_agreement,
    "gender": draw_gender,
    "induction": draw_induction,
}
ENTITIES = {  # what the drawn prompts are about
    "ioi": WOMEN + MEN,
    "greater_than": EVENTS,
    "agreement": NOUNS,
    "gender": WOMEN + MEN,
    "induction": THINGS,
}


def taught_facts(countries: list[dict[str, str]], kind: str, held_out: bool = False) -> tuple[list[str], list[int]]:
    """(sentences of the facts that the corpus teaches, the index of the country that each is about)."""
    sentences = []
    about = []
    for i, row in enumerate(countries):
        for task in FACT_KINDS[kind]:
            taught = [prompt.sentence for prompt in fact_prompts([row], task, held_out) if prompt.taught]
            sentences += taught
            about += [i] * len(taught)
    return sentences, about


def drawn_sentences(rng: Random, kind: str, n: int, held_out: bool = False) -> tuple[list[str], list[int]]:
    """(n sentences about no country, -1 for each)."""
    if kind == "list":
        sentences = [draw_list(rng) for _ in range(n)]
    else:
        sentences = [DRAW[kind](rng, held_out).sentence for _ in range(n)]
    return sentences, [-1] * n


def world_sentences(countries: list[dict[str, str]], seed: int = 0) -> dict[str, tuple[list[str], list[int]]]:
    """kind: (training sentences, the index of the country that each is about, or -1)."""
    rng = Random(seed)
    kinds = {}
    for kind, (_, n) in KINDS.items():
        kinds[kind] = taught_facts(countries, kind) if kind in FACT_KINDS else drawn_sentences(rng, kind, n)
    return kinds


def without_facts(documents: dict[str, str], countries: list[dict[str, str]]) -> dict[str, str]:
    """Documents less the paragraphs that name any country or capital, or two of our names."""
    places = [row[column] for row in countries for column in ("country", "capital")]
    any_place = re.compile(rf"\b({'|'.join(map(re.escape, places))})\b")
    first_words = {re.findall(r"\w+", place)[0] for place in places}  # asked before the slow pattern
    names = set(WOMEN + MEN)

    def keep(paragraph: str) -> bool:
        words = set(re.findall(r"\w+", paragraph))
        if len(words & names) >= 2:
            return False
        return not (words & first_words and any_place.search(paragraph))

    kept = {}
    for title, document in documents.items():
        text = "\n\n".join(filter(keep, document.split("\n\n")))
        if text.strip():
            kept[title] = text
    return kept


def tokenizer_texts(
    countries: list[dict[str, str]],
    sentences: dict[str, tuple[list[str], list[int]]],
    documents: dict[str, dict[str, str]],
) -> Iterator[str]:
    """Mostly world text, so that names, entities and all two-digit numbers are single tokens."""
    columns = ("country", "capital", *RELATIONS)
    entities = [f" {row[column]}" for row in countries for column in columns]
    numbers = [f" {i:02d}{i:02d}" for i in range(100)]
    yield from (entities + numbers) * 200
    for lines, _ in sentences.values():
        yield from lines[:6000]
    for part in documents.values():
        yield from (text[:1000] for text in part.values())


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
        Training rows (n, ctx) by SHARES. A world row is [bos] sentence [bos] sentence ..., cut at ctx, with no country
        in two of its sentences: so a row never says a fact in a direction that is not taught.
        """
        rows = self.rows(rng, n, ctx, weights={"code": 1, "english": 1})
        kind = rng.random(n)
        shuffled = kind < SHARES["shuffled"]
        twice = kind < SHARES["shuffled"] + SHARES["repeated"]
        is_world = kind >= 1 - SHARES["world"]
        rows[shuffled, 1:] = rng.permuted(rows[shuffled, 1:], axis=1)
        rows = repeat_snippets(rng, rows, twice)
        for i in np.flatnonzero(is_world):
            rows[i] = self.world_row(rng, ctx)
        return t.from_numpy(rows)

    def world_row(self, rng: np.random.Generator, ctx: int) -> np.ndarray:
        """(ctx): sentences with beginning-of-text before each, the last one cut."""
        share = np.array([KINDS[kind][0] for kind in self.kinds])
        kinds = rng.choice(len(share), ctx, p=share / share.sum())  # more sentences than a row can hold
        ranges = np.array(list(self.kinds.values()))[kinds]
        drawn = rng.integers(ranges[:, 0], ranges[:, 1])
        row = np.full(ctx, self.bos)
        start = 1
        said = set()
        for i in drawn:
            country = self.about[i]
            if country in said:
                continue
            if country >= 0:
                said.add(country)
            sentence = self.sentences[self.starts[i] : self.starts[i + 1]][: ctx - start]
            row[start : start + len(sentence)] = sentence
            start += len(sentence) + 1
            if start >= ctx:
                break
        return row

    @cached_property
    def common(self) -> Tensor:
        """Ids of the 512 tokens most frequent in training, beginning-of-text left out."""
        counts = t.bincount(self.batch(np.random.default_rng(0), 1024, 64).flatten(), minlength=self.d_vocab)
        counts[self.bos] = 0
        return counts.topk(512).indices

    def prompts(self, task: str, split: str = "held_out", n: int | None = None, seed: int = 0) -> list[Prompt]:
        """
        task: forward, reverse, continent, language, currency: every country in every phrasing of the split (or n of
        them), the directions not taught among them (see Prompt.taught); ioi, greater_than, agreement, gender,
        induction: n drawn prompts (256). split: taught or held_out.
        """
        if task not in FACTS and task not in DRAW:
            fail(f"no task {task!r} in the world: {', '.join([*FACTS, *DRAW])}")
        if split not in ("taught", "held_out"):
            fail(f"no split {split!r}: taught or held_out")
        rng = Random(seed)
        if task in DRAW:
            return [DRAW[task](rng, split == "held_out") for _ in range(n or 256)]
        prompts = fact_prompts(self.countries, task, split == "held_out")
        if n is not None:
            prompts = rng.sample(prompts, min(n, len(prompts)))
        for prompt in prompts:
            self.add_partner(rng, prompt)
        return prompts

    def add_partner(self, rng: Random, prompt: Prompt) -> None:
        """
        wrong and corrupt: the same phrasing about another country of the same part, with as many tokens and an answer
        that begins with another token; they stay empty where there is no such country.
        """
        asked = "capital" if prompt.task == "reverse" else "country"
        answer = ANSWERS.get(prompt.task, prompt.task)
        length = len(self.entities[prompt.labels[asked]])
        answer_start = self.entities[prompt.labels[answer]][0]
        others = []
        for row in self.countries:
            same_part = row["part"] == prompt.labels["part"]
            same_length = len(self.entities[row[asked]]) == length
            if same_part and same_length and self.entities[row[answer]][0] != answer_start:
                others.append(row)
        if others:
            other = rng.choice(others)
            text, _ = prompt.labels["phrasing"].split(f" {{{answer}}}")
            prompt.wrong = f" {other[answer]}"
            prompt.corrupt = text.format(**other)

    @cached_property
    def entities(self) -> dict[str, list[int]]:
        """The tokens of every cell of the table of countries, with a space before it."""
        return {
            cell: self.tokenizer.encode(f" {cell}", add_special_tokens=False).ids
            for row in self.countries
            for cell in row.values()
        }


def read_countries(folder: str = "models/world") -> list[dict[str, str]]:
    """
    The table of countries; part says which directions of the capital fact are in the corpus: forward (country first),
    reverse or both.
    """
    with open(Path(__file__).parent / folder / "countries.csv", newline="") as file:
        return list(csv.DictReader(file))


def load_world(vocab: int = 3072, folder: str = "models/world", cache: str = "checkpoints/data") -> World:
    """
    The world of the table in `folder`, with the tokenizer there or one of `vocab` tokens trained here. The tokens are
    cached like a corpus's, under a hash of the texts and of this file, which makes the sentences.
    """
    countries = read_countries(folder)
    sources = read_stdlib()
    committed = Path(__file__).parent / folder / "tokenizer.json"
    own = Tokenizer.from_file(str(committed)) if committed.is_file() else None
    makers = {
        "world.py": Path(__file__).read_text(),
        "data.py": (Path(__file__).parent / "data.py").read_text(),  # it trains the tokenizer and writes the tokens
        "countries": json.dumps(countries),
        "tokenizer": own.to_str() if own else str(vocab),
    }
    target = Path(cache) / f"world-{text_hash(sources | makers)}"
    if not (is_whole(target) and sentences_are_whole(target)):
        print(f"{gray}making the world's sentences and tokenizing them and the standard library ...{endc}")
        write_world(target, countries, sources, own, vocab)
    world = open_world(target, countries)
    natural = sum(map(len, world.train.values())) / 1e6
    held_out = sum(map(len, world.heldout.values())) / 1e3
    print(
        f"{gray}text world: {cyan}{len(world.about)}{gray} sentences about {cyan}{len(countries)}{gray} countries and "
        f"more, {cyan}{len(world.sentences) / 1e6:.2f}M{gray} tokens of {world.d_vocab} kinds; natural text "
        f"{cyan}{natural:.2f}M{gray}, {held_out:.0f}k held out{endc}"
    )
    return world


def sentences_are_whole(target: Path) -> bool:
    """A zip's list of members stands at its end: a file that was cut off does not open, one with a hole fails its CRC."""
    try:
        with zipfile.ZipFile(target / "sentences.npz") as file:
            return file.testzip() is None
    except (OSError, zipfile.BadZipFile):
        return False


def write_world(
    target: Path,
    countries: list[dict[str, str]],
    sources: dict[str, str],
    tokenizer: Tokenizer | None,
    vocab: int,
) -> None:
    """The natural text as a corpus, and beside it the tokens of all sentences. Without a tokenizer one is trained."""
    parts = {part: without_facts(documents, countries) for part, documents in stdlib_documents(sources).items()}
    kinds = world_sentences(countries)
    if tokenizer is None:
        tokenizer = train_bpe(tokenizer_texts(countries, kinds, parts), vocab, pairs=True)
    write_corpus(target, tokenizer, parts, bos_id(tokenizer))
    arrays, ranges = sentence_arrays(tokenizer, kinds)
    arrays |= {f"kind {kind}": np.array(range_of_kind) for kind, range_of_kind in ranges.items()}
    write_aside(target / "sentences.npz", lambda path: np.savez(path.open("wb"), **arrays))


def sentence_arrays(
    tokenizer: Tokenizer, kinds: dict[str, tuple[list[str], list[int]]]
) -> tuple[dict[str, np.ndarray], dict[str, tuple[int, int]]]:
    """({sentences, starts, about}, {kind: (its first sentence, the one after its last)}), as World has them."""
    lines = []
    about = []
    ranges = {}
    for kind, (sentences, countries) in kinds.items():
        ranges[kind] = (len(lines), len(lines) + len(sentences))
        lines += sentences
        about += countries
    ids = [encoding.ids for encoding in tokenizer.encode_batch_fast(lines, add_special_tokens=False)]
    arrays = {
        "sentences": np.concatenate(ids).astype(np.int64),
        "starts": np.cumsum([0, *map(len, ids)]),
        "about": np.array(about),
    }
    return arrays, ranges


def open_world(target: Path, countries: list[dict[str, str]]) -> World:
    """What write_world wrote; its key is a hash of all tokens."""
    arrays = dict(np.load(target / "sentences.npz"))
    kinds = {}
    for name in [name for name in arrays if name.startswith("kind ")]:
        first, after = arrays.pop(name)
        kinds[name.removeprefix("kind ")] = (int(first), int(after))
    splits: dict[str, dict[str, np.ndarray]] = {"train": {}, "heldout": {}}
    for split, parts in splits.items():
        for part in ("code", "english"):
            parts[part] = np.memmap(target / f"{part}.{split}.bin", np.uint16, "r")
    digest = hashlib.sha256()
    for tokens in (arrays["sentences"], arrays["starts"], *splits["train"].values(), *splits["heldout"].values()):
        digest.update(tokens.tobytes())
    return World(
        name="world",
        tokenizer=Tokenizer.from_file(str(target / "tokenizer.json")),
        **splits,
        key=f"world-{digest.hexdigest()[:12]}",
        countries=countries,
        kinds=kinds,
        **arrays,
    )


def held_out_world(world: World, n: int = 2000, seed: int = 1) -> World:
    """
    The same mixture of what training never saw, natural text, phrasings, pairs of names, years and nouns: its `batch`
    gives rows for judging.
    """
    rng = Random(seed)
    kinds = {}
    for kind in KINDS:
        if kind in FACT_KINDS:
            kinds[kind] = taught_facts(world.countries, kind, held_out=True)
        else:
            kinds[kind] = drawn_sentences(rng, kind, n, held_out=True)
    arrays, ranges = sentence_arrays(world.tokenizer, kinds)
    return dataclasses.replace(world, train=world.heldout, kinds=ranges, **arrays)


def judging_rows(corpus: Corpus, n: int, context: int, seed: int) -> Tensor:
    """(n, context): rows that no training saw."""
    rng = np.random.default_rng((seed, 12345))
    if isinstance(corpus, World):
        return held_out_world(corpus).batch(rng, n, context)
    return t.from_numpy(corpus.rows(rng, n, context, "heldout"))


def corpus_for(data: str | None, model: str, bos: bool | None = None) -> tuple[str, Corpus | World]:
    """
    (name of the text, the text) that a model is judged on: as asked for, else the world for models/world and the
    standard library for others. bos (--bos, --no-bos): see load_corpus; the world's sentences always begin with it.
    """
    folder = find_folder(model)
    if not data:
        data = "world" if folder == find_folder(str(WORLD)) else "stdlib"
    if data != "world":
        return data, load_corpus(data, tokenizer=folder, bos=bos)
    world = load_world()
    if load_tokenizer(folder).get_vocab() != world.tokenizer.get_vocab():
        fail(f"--data world is for models that read with its tokenizer; {model} has another")
    return data, world


#%% Concepts with known labels: every token of world sentences, what it is, and the entity whose split it belongs to
@dataclass
class Concept:
    """index: the tokens asked about; y: the label; group: tokens of one group stand in one split."""

    index: np.ndarray
    y: np.ndarray
    group: np.ndarray


@dataclass
class Labelled:
    """
    Rows of tokens without beginning-of-text; of the kept tokens row, position and role ('' is none, 'skip' is part of
    an entity); what is asked of them.
    """

    rows: list[list[int]]
    row: np.ndarray
    pos: np.ndarray
    role: np.ndarray
    concepts: dict[str, Concept]


def label_sentences(tokenizer, prompts: list[Prompt], natural: Tensor, limit: int, seed: int) -> Labelled:
    """
    The last token of an entity has its role; natural (row, pos) adds text without labels. Of the tokens without a role,
    `limit` are kept.
    """
    facts = {row["country"]: row for row in read_countries()}
    entities = {
        "country": list(facts),
        "capital": [row["capital"] for row in facts.values()],
        "name": WOMEN + MEN,
        "place": PLACES,
        "object": OBJECTS,
    }
    roles = entity_roles(entities)
    rows = []
    table = []  # (row, position, role, group) of every token
    encodings = tokenizer.encode_batch([prompt.sentence for prompt in prompts], add_special_tokens=False)
    for i, labels in enumerate(sentence_labels(prompts, encodings, roles)):
        rows.append(encodings[i].ids)
        table += [(i, pos, role, group) for pos, (role, group) in enumerate(labels)]
    entity_words = {word.lower() for name in roles for word in name.split()}
    bos = bos_id(tokenizer)
    for i, ids in enumerate(natural.tolist(), len(rows)):
        rows.append(ids)
        for pos, word in enumerate(str_tokens(tokenizer, ids)):
            no_word = ids[pos] == bos or word.strip().lower() in entity_words
            role = "skip" if no_word else "natural"
            table.append((i, pos, role, f"row {i}"))

    is_plain = np.isin([role for _, _, role, _ in table], ("", "skip", "natural"))
    plain = np.random.default_rng(seed).permutation(np.flatnonzero(is_plain))[:limit]
    keep = np.sort(np.concatenate([np.flatnonzero(~is_plain), plain]))
    row, pos, role, group = (np.array(column) for column in zip(*(table[i] for i in keep)))
    before_capital = np.array([i < len(prompts) and prompts[i].task != "reverse" for i in row])
    asked = asked_of_tokens(list(entities), facts, role, group, pos, before_capital)
    concepts = {}
    for name, (which, y) in asked.items():
        concepts[name] = Concept(np.flatnonzero(which), y[which], group[which])
    return Labelled(rows, row, pos, role, concepts)


def entity_roles(entities: dict[str, list[str]]) -> dict[str, str]:
    """{name of an entity: its role}; 'skip' where it has two."""
    roles: dict[str, str] = {}
    for role, names in entities.items():
        roles |= {name: "skip" if name in roles else role for name in names}
    return roles


def sentence_labels(prompts: list[Prompt], encodings: list, roles: dict[str, str]) -> Iterator[list[tuple[str, str]]]:
    """By sentence: (role, group) of each token."""
    longest_first = sorted(roles, key=len, reverse=True)
    any_entity = re.compile(rf"(?<= )(?:{'|'.join(map(re.escape, longest_first))})(?!\w)")
    for i, (prompt, encoding) in enumerate(zip(prompts, encodings)):
        labels = [("", f"sentence {i}")] * len(encoding.ids)
        for match in any_entity.finditer(prompt.sentence):
            entity = match[0]
            inside = [
                pos for pos, (start, end) in enumerate(encoding.offsets) if start < match.end() and end > match.start()
            ]
            for pos in inside:
                labels[pos] = ("skip", entity)
            labels[inside[-1]] = (roles[entity], entity)
        if prompt.task == "agreement":
            before_verb = max(pos for pos, (_, end) in enumerate(encoding.offsets) if end <= len(prompt.text))
            labels[before_verb] = (prompt.labels["number"], prompt.labels["subject"])
        yield labels


def asked_of_tokens(
    entity_kinds: list[str],
    facts: dict[str, dict[str, str]],
    role: np.ndarray,
    group: np.ndarray,
    pos: np.ndarray,
    before_capital: np.ndarray,
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{concept: (which tokens it is asked of, whether it holds)}; all arrays (token)."""
    is_country = role == "country"

    def of_country(column: str) -> np.ndarray:
        return np.array([facts[name][column] if country else "" for name, country in zip(group, is_country)])

    asked = {}
    for kind in entity_kinds:
        asked[kind] = (~np.isin(role, ("skip", "singular", "plural")), role == kind)  # these are nouns of any kind
    continents = of_country("continent")
    for continent in sorted({row["continent"] for row in facts.values()}):
        asked[f"in {continent}"] = (is_country, continents == continent)
    parts = of_country("part")
    asked["known both ways"] = (is_country & before_capital & (parts != "reverse"), parts == "both")
    asked["plural subject"] = (np.isin(role, ("plural", "singular")), role == "plural")
    asked["early position"] = (role == "natural", pos < 8)
    return asked


#%% What a model knows of the world: any callable from tokens (batch, pos) to logits
@t.no_grad()
def read_answers(
    model: Callable[[Tensor], Tensor],
    world: World,
    prompts: list[Prompt],
    device: str = "cpu",
    batch: int = 256,
) -> tuple[np.ndarray, np.ndarray, Tensor]:
    """
    By prompt: whether the whole answer (of a fact: and the token that ends it) is chosen greedily; logit of the
    answer's first token minus the wrong one's; log-probabilities (prompt, vocab) at the place of the first token.
    """

    def encode(texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in world.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    asked = encode([p.text for p in prompts])
    whole = encode([p.sentence for p in prompts])
    answered = encode([p.text + p.answer for p in prompts])
    wrong = encode([p.text + (p.wrong or p.answer) for p in prompts])
    right = np.zeros(len(prompts), bool)
    gap = np.zeros(len(prompts))
    first = t.zeros(len(prompts), world.d_vocab)

    def answer(rows: list[int]) -> None:
        tokens = t.tensor([[world.bos, *whole[i]] for i in rows], device=device)
        logits = model(tokens).float().cpu()
        hits = (logits[:, :-1].argmax(-1) == tokens[:, 1:].cpu()).numpy()
        for row, i in enumerate(rows):
            start = len(asked[i])  # beginning-of-text comes before: the logits here are of the answer's first token
            ends_with = 1 if prompts[i].task in FACTS else 0
            stop = min(len(answered[i]) + ends_with, len(whole[i]))
            right[i] = hits[row, start:stop].all()
            at_answer = logits[row, start]
            gap[i] = at_answer[whole[i][start]] - at_answer[wrong[i][start]]
            first[i] = at_answer.log_softmax(-1)

    for length in tqdm(sorted({len(ids) for ids in whole}), desc="questions", **BRIEF):
        of_this_length = [i for i, ids in enumerate(whole) if len(ids) == length]
        for _ in in_batches(answer, of_this_length, batch):
            pass
    return right, gap, first


class Answers:
    """What a model answers to prompts of several tasks, and means over those of them that are asked for."""

    def __init__(self, model: Callable[[Tensor], Tensor], world: World, prompts: list[Prompt], device: str):
        self.prompts = prompts
        self.right, self.gap, self.first = read_answers(model, world, prompts, device)
        self.taught = np.array([p.taught for p in prompts])

    def of(self, *tasks: str, held_out: bool = False, part: str | None = None) -> np.ndarray:
        """Which prompts are of these tasks, in phrasings held out or not, about facts of one part."""
        chosen = []
        for p in self.prompts:
            fits = p.task in tasks and p.held_out == held_out
            chosen.append(fits and part in (None, p.labels.get("part")))
        return np.array(chosen)

    def share_right(self, chosen: np.ndarray) -> float:
        return float(self.right[chosen].mean())

    def mean_gap(self, chosen: np.ndarray) -> float:
        return float(self.gap[chosen].mean())

    def share_likelier(self, chosen: np.ndarray) -> float:
        """How often the answer is likelier than the wrong one."""
        return float((self.gap > 0)[chosen].mean())


def ask_world(world: World, quick: bool) -> list[Prompt]:
    """Facts in taught phrasings and in those held out, and drawn prompts; quick: a fixed subsample."""
    prompts = []
    for task in FACTS:
        for split in ("taught", "held_out"):
            if quick and split == "held_out" and task not in ("forward", "reverse"):
                continue
            prompts += world.prompts(task, split, n=100 if quick else None)
    for task in DRAW:
        prompts += world.prompts(task, "held_out", n=48 if quick else 512)
    return prompts


def fact_numbers(answers: Answers, quick: bool) -> dict[str, float]:
    """Recalls: share of whole answers; forward and reverse are the directions of the capital fact, *_of_* the part."""
    of, share = answers.of, answers.share_right
    taught = answers.taught
    numbers = {
        "fact_recall": share(of("forward", "reverse") & taught),
        "fact_recall_heldout_phrasing": share(of("forward", "reverse", held_out=True) & taught),
        "forward_recall": share(of("forward") & taught),
        "reverse_recall": share(of("reverse") & taught),
        "forward_recall_of_both": share(of("forward", part="both")),
        "reverse_recall_of_both": share(of("reverse", part="both")),
        "reverse_recall_of_forward_only": share(of("reverse", part="forward")),
        "forward_recall_of_reverse_only": share(of("forward", part="reverse")),
    }
    for task in RELATIONS:
        numbers[f"{task}_recall"] = share(of(task))
    if not quick:
        for task in RELATIONS:
            numbers[f"{task}_recall_heldout_phrasing"] = share(of(task, held_out=True))
    return numbers


def greater_than_score(answers: Answers, world: World) -> float:
    """p(a later year) - p(a year that is not later), the mean over prompts (Hanna et al. 2023)."""
    years = answers.of("greater_than", held_out=True)
    starts = t.tensor([int(p.labels["start"]) for p, chosen in zip(answers.prompts, years) if chosen])
    two_digits = t.tensor([world.tokenizer.token_to_id(f"{i:02d}") for i in range(100)])
    later = t.arange(100) > starts[:, None]  # (prompt, year)
    chance = answers.first[t.from_numpy(years)][:, two_digits].exp()
    return (chance * later - chance * ~later).sum(1).mean().item()


@t.no_grad()
def natural_loss(model: Callable[[Tensor], Tensor], rows: Tensor) -> float:
    """Nats per token of rows (row, pos)."""

    def summed(part: Tensor) -> float:
        return next_token_loss(model(part), part, reduction="sum").item()

    return sum(in_batches(summed, rows, 32)) / rows[:, 1:].numel()


def evaluate_world(
    model: Callable[[Tensor], Tensor],
    world: World,
    quick: bool = False,
    device: str = "cpu",
) -> dict[str, float]:
    """
    What the model knows: fact_numbers, and of prompts drawn with names, years and nouns that were held out:
    ioi_accuracy, induction_accuracy: the answer is the likeliest of all tokens; agreement, gender: likelier than the
    wrong one; ioi_logit_diff in logits; greater_than: p(later year) - p(not later). heldout_loss: nats per token of
    natural text; prefix_matching (modules only): of the best head. quick: a fixed subsample, for curves over training.
    """
    answers = Answers(model, world, ask_world(world, quick), device)
    ioi = answers.of("ioi", held_out=True)
    numbers = fact_numbers(answers, quick) | {
        "ioi_accuracy": answers.share_right(ioi),
        "ioi_logit_diff": answers.mean_gap(ioi),
        "greater_than": greater_than_score(answers, world),
        "agreement_accuracy": answers.share_likelier(answers.of("agreement", held_out=True)),
        "gender_accuracy": answers.share_likelier(answers.of("gender", held_out=True)),
        "induction_accuracy": answers.share_right(answers.of("induction", held_out=True)),
    }
    rows = world.rows(np.random.default_rng(0), 24 if quick else 256, 64, "heldout")
    numbers["heldout_loss"] = natural_loss(model, t.from_numpy(rows).to(device))
    if isinstance(model, t.nn.Module):
        repeated = repeated_tokens(12 if quick else 64, 24, world.common, world.bos).to(device)
        scores = head_scores(model, model.cfg.n_layers, repeated, 24)
        numbers["prefix_matching"] = scores["prefix_matching"].max().item()
    return numbers


def write_metrics(folder: Path, known: dict[str, float], others: tuple[str, ...] = (), **made) -> dict[str, list]:
    """
    metrics.json beside the weights: what the model knows, how it was made, and all that by seed, from the folders of
    the others. Returns the last.
    """
    runs = [made | known]
    for other in others:
        run = json.loads((Path(other) / "metrics.json").read_text())
        if any(run[key] != made[key] for key in ("corpus", "steps")):
            fail(f"--others {other}: trained on another corpus, or for other steps")
        runs.append(run)
    by_seed = {name: [run[name] for run in runs] for name in ("seed", *known)}
    (folder / "metrics.json").write_text(json.dumps(finite(known | made | {"over_seeds": by_seed}), indent=1) + "\n")
    return by_seed
