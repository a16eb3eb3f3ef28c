"""
What happens when we push along a model's directions? Countries are moved to other continents, features are edited, and
an answer is traced to the features behind it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from utils import (  # first: sets OpenMP's variables before torch is loaded
    BRIEF,
    cyan,
    endc,
    fail,
    green,
    pick_device,
    purple,
    save_results,
    set_seed,
)
from plots import bar, label_tokens, line, plain, show, visible
from hooks import replace_input, run_with_hooks
from data import refuse_empty, str_tokens
from launch import flags
from world import Labelled, Prompt, fact_prompts, read_countries
from interventions import loss_of, put
from sae import GPT2_PRESET, SAEConfig, with_sparsity
from features import Attribution, Subject, change, firing_order, judge, open_subject, require_good_sae, sparse
from lens import knows_world
from probes import (
    TEST,
    TRAIN,
    concepts_of_features,
    harvest_labelled,
    labelled_tokens,
    make_trial,
    refuse_one_sided,
    split,
    subject_position,
)
from llama_block import Llama

import numpy as np
import torch as t
import torch.nn as nn
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor
from tqdm import tqdm


#%% Settings: the shell sets them by flags, a notebook edits them here; with equal SAEConfig's it is sae_probe.py's SAE
@dataclass
class Config(SAEConfig):
    sentences: int = 150  # labelled sentences of each kind, by which features are chosen
    strengths: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)  # of pushes, in mean distances of two continents; 1 is added
    prompt: str = "The capital of France is"  # whose answer is traced to features
    device: str = "auto"  # auto (cuda, then mps, then cpu), or one of them


if __name__ == "__main__":
    cfg = flags(Config, __doc__, hpc=Config(**GPT2_PRESET))
    device = pick_device(cfg.device)
    set_seed(cfg.seed)
    refuse_empty(cfg.prompt)
    if cfg.sentences < 10:
        fail("--sentences is 10 or more")
    if not all(np.isfinite(cfg.strengths)) or not cfg.strengths:
        fail("--strengths are one or more finite numbers")

#%% The model, its text and the SAE, and the gate: nobody pushes along features that do not rebuild the activation
if __name__ == "__main__":
    if not (cfg.sae or cfg.release):
        cfg = with_sparsity(cfg)
    subject = open_subject(cfg, (Llama,), device)
    model = subject.model
    sae = subject.sae
    hook = subject.hook
    judged, codes = judge(model, sae, subject.rows, subject.first, subject.corpus.bos)
    print(
        f"{purple}=== {subject.about}: {cyan}L0 {judged['l0']:.1f}, "
        f"{judged['ce_recovered']:.1%} of the cross-entropy recovered{purple} ==={endc}"
    )
    require_good_sae(judged, cfg, hook)

#%% Which feature stands for which concept: chosen on validation entities as in sae_probe.py, without its probes
if __name__ == "__main__":
    labelled = labelled_tokens(subject.tokenizer, subject.corpus, cfg.sentences, cfg.seed, knows_world(model))
    for name, concept in labelled.concepts.items():
        refuse_one_sided(make_trial(concept, cfg.seed), name)
    activations = harvest_labelled(model, labelled, [hook], subject.bos, device)[hook]  # (labelled token, d_in)
    labelled_codes = sparse(sae.encode(activations.to(device)))
    concepts_of = concepts_of_features(labelled, labelled_codes, cfg.seed)
    feature_of = {concept: f for f, concepts in concepts_of.items() for concept in concepts}
    for concept, f in feature_of.items():
        print(f"{purple}{concept}{endc} {cyan}f{f}{endc}")


#%% Steering: the prompts about test countries, and the directions from where a country is to each other continent
@dataclass
class Asked:
    """Every prompt with one word after it, less the word's last token."""

    tokens: Tensor  # (prompt, pos), padded on the right
    places: Tensor  # (prompt, pos, 1): 1.0 from the country's last token on
    last: Tensor  # (prompt) the prompt's last position, where the word begins to be said

    @classmethod
    def of(cls, rows: list[list[int]], starts: list[int], lengths: list[int], device: str) -> "Asked":
        """rows: tokens of each prompt with what follows it; starts: of the push; lengths: of the prompts alone."""
        tokens = nn.utils.rnn.pad_sequence([t.tensor(row) for row in rows], batch_first=True)
        from_country = t.arange(tokens.shape[1]) >= t.tensor(starts)[:, None]
        last = t.tensor(lengths) - 1
        return cls(tokens.to(device), from_country.float()[..., None].to(device), last.to(device))


def word_tokens(tokenizer, text: str, word: str) -> list[int]:
    """All tokens of a word that follows the text."""
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    whole = tokenizer.encode(f"{text} {word}", add_special_tokens=False).ids
    if whole[: len(ids)] != ids or len(whole) == len(ids):
        fail(f"the tokenizer joins the end of {text[-12:]!r} and {word!r} into one token: the word cannot be asked for")
    return whole[len(ids) :]


class ContinentQuestions:
    """
    Prompts that ask for a country's continent; what the model answers when its stream is edited from the country on.
    A continent is its whole word: the log-probabilities of all its tokens are summed.
    """

    def __init__(self, subject: Subject, prompts: list[Prompt], continents: list[str], device: str):
        self.model = subject.model
        self.hook = subject.hook
        tokenizer = subject.tokenizer
        starts = [subject_position(tokenizer, prompt, len(subject.bos)) for prompt in prompts]
        asked = [subject.bos + tokenizer.encode(prompt.text, add_special_tokens=False).ids for prompt in prompts]
        lengths = [len(row) for row in asked]
        self.words = []  # by continent, (prompt, token) padded by -1
        self.passes: list[tuple[Asked, list[int]]] = []  # rows, and the continents whose words are read from them
        said_before: dict[str, int] = {}  # the pass of these rows: of one-token words it is one for all
        for i, name in enumerate(continents):
            words = [word_tokens(tokenizer, prompt.text, name) for prompt in prompts]
            padded = nn.utils.rnn.pad_sequence([t.tensor(word) for word in words], True, -1)
            self.words.append(padded.to(device))
            rows = [row + word[:-1] for row, word in zip(asked, words)]
            if str(rows) not in said_before:
                said_before[str(rows)] = len(self.passes)
                self.passes.append((Asked.of(rows, starts, lengths, device), []))
            self.passes[said_before[str(rows)]][1].append(i)
        right = [continents.index(prompt.labels["continent"]) for prompt in prompts]
        self.right = t.tensor(right, device=device)  # (prompt)

    def __len__(self) -> int:
        return len(self.right)

    @t.no_grad()
    def answers(self, delta: Callable[[Tensor], Tensor] = t.zeros_like) -> Tensor:
        """
        (prompt, continent) log-probabilities less the right continent's, after delta(x) is added to the stream x from
        the country on. For words of one token that is the difference of their logits.
        """
        said = t.empty(len(self), len(self.words), device=self.right.device)
        for asked, continents in self.passes:
            longest = max(self.words[i].shape[1] for i in continents)
            log_p = self.log_p_after(asked, longest, delta)
            for i in continents:
                words = self.words[i]
                by_token = log_p[:, : words.shape[1]].gather(2, words.clamp(min=0)[..., None])[..., 0]
                said[:, i] = by_token.masked_fill(words < 0, 0.0).sum(1)
        return said - said.gather(1, self.right[:, None])

    def log_p_after(self, asked: Asked, n: int, delta: Callable[[Tensor], Tensor]) -> Tensor:
        """Log-probabilities (prompt, n, d_vocab) where a word is said, whose positions alone are unembedded."""
        prompt = t.arange(len(self), device=asked.last.device)[:, None]
        places = asked.last[:, None] + t.arange(n, device=asked.last.device)
        places = places.clamp(max=asked.tokens.shape[1] - 1)  # beyond the end nothing is said
        undo = replace_input(self.model.unembed, lambda x: x[prompt, places])
        try:
            edit = put(lambda x: x + delta(x) * asked.places)
            return run_with_hooks(self.model, asked.tokens, [(self.hook, edit)]).float().log_softmax(-1)
        finally:
            undo()


def require_telling_words(plain: Tensor) -> None:
    """The gate: answers (prompt, continent) differ between continents, else every effect is zero by itself."""
    spread = plain.std(1).max().item()
    if not spread > 1e-4:
        fail(
            f"gate: without a push the model's answers differ between continents by {spread:.0e} nats: its tokenizer "
            "or the model does not tell their words apart, and no effect on them can be read"
        )


def continent_means(activations: Tensor, labelled: Labelled, continents: list[str], seed: int, device: str) -> Tensor:
    """(continent, d_in): the mean activation at the countries of each continent, over training countries."""
    located = [labelled.concepts[f"in {name}"] for name in continents]  # one set of tokens, six questions
    home = np.stack([concept.y for concept in located]).argmax(0)
    part = split(located[0], seed)
    means = []
    for i in range(len(continents)):
        tokens = located[0].index[(part == TRAIN) & (home == i)]
        if not len(tokens):
            fail(f"no training country is in {continents[i]} among the labelled sentences: give more --sentences")
        means.append(activations[tokens].mean(0))
    return t.stack(means).to(device)


def steering_directions(
    sae, means: Tensor, right: Tensor, alive: list[int], seed: int
) -> tuple[dict[str, list[Tensor]], list[int]]:
    """
    By kind, directions (prompt or 1, 1, d_in): of the first two kinds one for each target continent, of the random ones
    ten that serve for every target. And the feature closest to each continent's mean. right (prompt): where each
    prompt's country is.
    """
    generator = t.Generator().manual_seed(seed)
    decoder = F.normalize(sae.W_dec.float(), dim=1)
    apart = F.normalize(means - means.mean(0), dim=1)
    closest = (decoder @ apart.T).argmax(0).tolist()
    drawn = [alive[i] for i in t.randint(len(alive), (10,), generator=generator).tolist()]
    random = t.randn(10, 1, 1, sae.cfg.d_in, generator=generator).to(means.device)
    directions = {
        "difference of means": [(mean - means[right])[:, None] for mean in means],
        "closest feature": list(sae.W_dec[closest].float()[:, None, None]),
        "random features": list(sae.W_dec[drawn].float()[:, None, None]),
        "random directions": list(random),
    }
    return directions, closest


if __name__ == "__main__":
    continents = [name.removeprefix("in ") for name in labelled.concepts if name.startswith("in ")]
    located = labelled.concepts[f"in {continents[0]}"]
    test_countries = set(located.group[split(located, cfg.seed) == TEST])
    asked = [
        prompt
        for prompt in fact_prompts(read_countries(), "continent", True)
        if prompt.labels["country"] in test_countries
    ]
    questions = ContinentQuestions(subject, asked, continents, device)
    means = continent_means(activations, labelled, continents, cfg.seed, device)
    distance = t.pdist(means).mean()  # of two continents: the unit of strength
    directions, closest = steering_directions(sae, means, questions.right, firing_order(codes), cfg.seed)


#%% Steering: countries are moved to another continent, against random features and directions of the same length
def steering_effect(
    questions: ContinentQuestions, plain: Tensor, directions: list[Tensor], length: Tensor, any_target: bool
) -> tuple[float, float]:
    """
    Mean rise of logit(target) - logit(right), and the share of answers that become the target, over prompts about other
    continents. Direction i moves to continent i; with any_target, each direction is tried for every target. plain: the
    answers without a push.
    """
    rises = []
    turned = []
    for i, direction in enumerate(directions):
        after = questions.answers(lambda x: length * F.normalize(direction, dim=-1))
        for target in range(plain.shape[1]) if any_target else [i]:
            elsewhere = questions.right != target
            rises.append((after - plain)[elsewhere, target].mean().item())
            turned.append((after.argmax(1) == target)[elsewhere].float().mean().item())
    return float(np.mean(rises)), float(np.mean(turned))


if __name__ == "__main__":
    unpushed = questions.answers()
    require_telling_words(unpushed)
    right_before = (unpushed.argmax(1) == questions.right).float().mean().item()
    print(
        f"{cyan}without a push {right_before:.1%} of the answers are right, {1 / len(continents):.1%} by chance{endc}"
    )
    steered: dict[str, dict[float, tuple[float, float]]] = {}  # kind: strength: (rise, turned)
    strengths = sorted({1.0, *cfg.strengths})
    for kind, of_kind in tqdm(directions.items(), desc="steering", **BRIEF):
        is_random = kind.startswith("random")
        steered[kind] = {
            strength: steering_effect(questions, unpushed, of_kind, strength * distance, any_target=is_random)
            for strength in strengths
        }
    rise_at_1 = {kind: effects[1.0][0] for kind, effects in steered.items()}
    best = max(("difference of means", "closest feature"), key=rise_at_1.get)
    by_chance = max(rise_at_1["random features"], rise_at_1["random directions"])
    numbers = {
        "steering_effect": rise_at_1[best],
        "steering_effect_random": by_chance,
        "steering_direction": best,
        "right_before": right_before,
        "steering": {kind: {str(s): effect for s, effect in effects.items()} for kind, effects in steered.items()},
    }
    table = []
    for kind, effects in steered.items():
        rises = [rise for rise, _ in effects.values()]
        turned = [share for _, share in effects.values()]
        table.append([kind, *rises, *turned])
    print(
        f"{purple}=== {len(questions)} prompts about test countries, moved towards each other continent from the "
        f"country on; strength 1 is the mean distance of two continents ({distance:.1f}) ==={endc}"
    )
    headers = ["", *(f"logits at {s:g}" for s in strengths), *(f"turned at {s:g}" for s in strengths)]
    print(cyan + tabulate(table, headers=headers, floatfmt=".3f") + endc)

#%% ... as lines over the strength
if __name__ == "__main__":
    fig = line(
        {kind: [rise for rise, _ in effects.values()] for kind, effects in steered.items()},
        title=(
            f"Steering continents at {hook} "
            f"(n = {len(questions)} prompts x {len(continents) - 1} targets; {subject.name})"
        ),
        xlabel="strength (mean distances of two continents)",
        ylabel="rise of logit(target) - logit(right)",
        x=strengths,
        markers=True,
        dashed=["random features", "random directions"],
    )
    show(
        fig,
        "feature_steering/steering",
        "How far a push moves the answer to the target continent. Solid above dashed: the direction means the continent; "
        "where they meet, the push is so long that any direction would do.",
    )


#%% Concept features added, clamped, ablated, projected out: the loss and the right continent, against other directions
def same_length(edit: Callable[[Tensor], Tensor], direction: Tensor, x: Tensor) -> Tensor:
    """As far from x as the edit goes, but along another direction."""
    return edit(x).norm(dim=-1, keepdim=True) * F.normalize(direction, dim=-1)


def log_p_right(answers: Tensor) -> float:
    """Mean log-probability of the right continent among the continents; answers are logits less the right one's."""
    return -answers.logsumexp(-1).mean().item()


if __name__ == "__main__":
    text = subject.rows[:24]
    loss_before = loss_of(model, text, [])
    elsewhere = directions["random features"][:2] + directions["random directions"][:2]
    edits = []
    for f in tqdm(dict.fromkeys([feature_of["country"], feature_of["name"], closest[0]]), desc="edits", **BRIEF):
        largest = float(codes[:, [f]].max())
        for how in ("add", "clamp", "ablate", "project"):
            edit = partial(change, sae, f, how, amount=largest)
            losses = []
            moved = []
            for delta in (edit, *(partial(same_length, edit, direction) for direction in elsewhere)):
                on_text = put(lambda x: x + delta(x), subject.first)
                losses.append(loss_of(model, text, [(hook, on_text)]) - loss_before)
                moved.append(log_p_right(questions.answers(delta)) - log_p_right(unpushed))
            name = f"f{f} {', '.join(concepts_of.get(f, []))}"
            edits.append([name, how, losses[0], float(np.mean(losses[1:])), moved[0], float(np.mean(moved[1:]))])
    numbers["edits"] = edits
    headers = ["feature", "edit", "loss", "loss, random", "log p(right of the continents)", "random"]
    print(cyan + tabulate(edits, headers=headers, floatfmt="+.4f") + endc)

#%% One answer traced to features and to the SAE's error by gradient x activation, and by ablating each node for real
if __name__ == "__main__":
    tokens = t.tensor([subject.bos + subject.tokenizer.encode(cfg.prompt, add_special_tokens=False).ids], device=device)
    with t.no_grad():
        top = model(tokens)[0, -1].float().softmax(-1).topk(2)
    answer, rival = (visible(token) for token in str_tokens(subject.tokenizer, top.indices))
    one_hot = F.one_hot(top.indices, model.W_U.shape[1]).float()
    traced = Attribution(model, sae, tokens, one_hot[0] - one_hot[1])
    assert traced.moved < 1e-3 * max(1.0, traced.value.abs()), (
        f"features + error do not rebuild the activation: the metric moves by {traced.moved}"
    )
    labels = label_tokens(str_tokens(subject.tokenizer, tokens[0]))
    nodes = []  # [name, concept, gradient x activation, falls when ablated]
    for i in traced.features.abs().flatten().topk(20).indices.tolist():
        pos, f = divmod(i, sae.cfg.d_sae)
        concept = ", ".join(concepts_of.get(f, []))
        nodes.append([f"f{f} {labels[pos]}", concept, traced.features[pos, f].item(), traced.falls(pos, f)])
    for pos, by_gradient in enumerate(traced.error.tolist()):
        nodes.append([f"error {labels[pos]}", "", by_gradient, traced.falls(pos, None)])
    by_gradient = [node[2] for node in nodes]
    when_ablated = [node[3] for node in nodes]
    agreement = float(np.corrcoef(by_gradient, when_ablated)[0, 1])
    numbers["attribution"] = {
        "prompt": cfg.prompt,
        "answer": answer,
        "over": rival,
        "value": traced.value,
        "from_features": traced.features.sum(),
        "from_errors": traced.error.sum(),
        "ablation_correlation": agreement,
    }
    print(
        f"{purple}=== Why '{answer}' ({top.values[0]:.2f}) and not '{rival}' after {cfg.prompt!r}: "
        f"{traced.value:.2f} logits; by gradient {traced.features.sum():.2f} from features, "
        f"{traced.error.sum():.2f} from errors ==={endc}"
    )
    strongest = sorted(nodes, key=lambda node: -abs(node[3]))[:15]
    headers = ["node", "concept", "gradient x activation", "falls when ablated"]
    print(cyan + tabulate(strongest, headers=headers, floatfmt=".3f") + endc)

#%% ... as bars, by gradient beside what ablation really does
if __name__ == "__main__":
    fig = bar(
        {"gradient x activation": by_gradient, "ablated": when_ablated},
        title=(
            f"Nodes at {hook} behind '{plain(answer)}' over '{plain(rival)}' after {plain(repr(cfg.prompt))} "
            f"(r = {agreement:.2f}; {subject.name})"
        ),
        xlabel="feature or error at token",
        ylabel="logit difference",
        x=[node[0] for node in nodes],
    )
    show(
        fig,
        "feature_steering/attribution",
        "What each feature, or the autoencoder's error, gives the answer: foreseen by its gradient, and measured by taking "
        "it out. Where the two differ, the model is not linear in it.",
    )

#%% The numbers for machines, and the conclusion
if __name__ == "__main__":
    save_results("feature_steering", cfg, **numbers)
    print(
        f"{green}Steering by {best}: {rise_at_1[best]:+.1f} logits for the target continent, at random "
        f"{by_chance:+.1f}. '{answer}' over '{rival}': gradient and ablation of its nodes agree "
        f"at r = {agreement:.2f}.{endc}"
    )
