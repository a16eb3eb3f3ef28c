"""The roles of GPT-2's circuit for indirect objects (Wang et al. 2023), found in any model."""

from typing import NamedTuple

from utils import fail  # first: sets OpenMP's variables before torch is loaded
from hooks import act_name, cache_from_resid, rows_that_fit
from pairs import Pairs, by_groups, inputs
from graph import Graph
from path_patching import TraceBy, path_losses

import torch as t
import torch.nn as nn
import torch.nn.functional as F
from einops import einsum
from torch import Tensor


#%% What each role looks at. A role of your own: its line in ROLES, a method of RoleSearch, and its place in find_roles;
# a place that pairs.find_places does not name yet is added there
ROLES = {  # where a role looks from and to
    "name mover": ("end", "IO"),
    "negative name mover": ("end", "IO"),
    "S-inhibition": ("end", "S2"),
    "induction": ("S2", "S1+1"),
    "duplicate token": ("S2", "S1"),
    "previous token": ("S1+1", "S1"),
}


LIKE = {  # where else such a token stands: a head that looks at any name has no eye for this one
    "IO": ("S1", "S2"),
    "S2": ("IO", "S1"),
    "S1": ("IO",),
    "S1+1": ("IO+1",),
}


WANG = {  # the heads in GPT-2 small
    "name mover": "L9H9 L9H6 L10H0",
    "negative name mover": "L10H7 L11H10",
    "S-inhibition": "L7H3 L7H9 L8H6 L8H10",
    "induction": "L5H5 L6H9",
    "duplicate token": "L0H1 L3H0",
    "previous token": "L2H2 L4H11",
}


class Roles(NamedTuple):
    """
    scores {role: (layer, head)}: attention from where the role looks to what it looks at. bars {role: float}: `floor`
    or, if larger, the 99th percentile of the best head's score with keys drawn at random. elsewhere {role: (layer,
    head)}: the 99th percentile of the head's own attention to another token of the kind (another name; what follows
    one), 0 where there is none before the query. found {role: heads}: above both, and acting as the role acts.
    """

    scores: dict[str, Tensor]
    bars: dict[str, float]
    elsewhere: dict[str, Tensor]
    found: dict[str, list[str]]


@t.no_grad()
def find_roles(
    model: nn.Module,
    graph: Graph,
    pairs: Pairs,
    metric: str,
    memory_gb: float = 1.0,
    shuffles: int = 1000,
    floor: float = 0.1,
    seed: int = 0,
    by: TraceBy = "path_patch",
) -> Roles:
    """
    Heads that look where their role looks, above both bars (see Roles). Movers must also write the answer (or against it) to the logits along direct paths, and S-inhibition heads act so on the
    movers' queries, beyond the 99th percentile of the best head's effect with signs drawn at random. Direct paths are
    path_losses' (by).
    """
    if metric == "kl":
        fail("roles help the answer or hurt it, and kl has no sign: --metric logit_diff or log_prob")
    search = RoleSearch(model, graph, pairs, metric, memory_gb, shuffles, floor, seed, by)
    movers = search.name_movers()
    found = {
        "name mover": movers,
        "negative name mover": search.negative_name_movers(),
        "S-inhibition": search.s_inhibition_heads(movers),
        "induction": search.induction_heads(),
        "duplicate token": search.duplicate_token_heads(),
        "previous token": search.previous_token_heads(),
    }
    return Roles(search.scores, search.bars, search.elsewhere, found)


class RoleSearch:
    """
    Which heads look as a role looks (scores, bars, elsewhere, looking), and which of them also do what it does: one
    method per role.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: Graph,
        pairs: Pairs,
        metric: str,
        memory_gb: float,
        shuffles: int,
        floor: float,
        seed: int,
        by: TraceBy,
    ):
        self.model = model
        self.graph = graph
        self.pairs = pairs
        self.metric = metric
        self.by = by
        self.memory_gb = memory_gb
        self.shuffles = shuffles
        self.generator = t.Generator().manual_seed(seed)

        self.scores: dict[str, Tensor] = {}
        self.bars: dict[str, float] = {}
        self.elsewhere: dict[str, Tensor] = {}
        self.looking: dict[str, list[str]] = {}
        attention = attention_from_places(model, graph, pairs, memory_gb)
        for role, (query, key) in ROLES.items():
            self.scores[role] = self.mean_attention(attention[query], position_of(pairs, key))
            self.bars[role] = max(floor, self.chance_attention(attention[query], position_of(pairs, query)))
            self.elsewhere[role] = self.attention_elsewhere(attention[query], position_of(pairs, query), LIKE[key])
            bar = self.elsewhere[role].clamp(min=self.bars[role])
            above = (self.scores[role] > bar).flatten().nonzero()[:, 0].tolist()
            self.looking[role] = [graph.head_names[i] for i in above]

    def name_movers(self) -> list[str]:
        """From the end they attend to the indirect object and write it to the logits."""
        return self.acting(self.looking["name mover"], ["logits"])

    def negative_name_movers(self) -> list[str]:
        """From the end they attend to the indirect object and write against it."""
        return self.acting(self.looking["negative name mover"], ["logits"], sign=-1)

    def s_inhibition_heads(self, movers: list[str]) -> list[str]:
        """From the end they attend to the second subject and steer the name movers' queries."""
        if not movers:
            return []
        return self.acting(self.looking["S-inhibition"], self.graph.receivers_of(movers, "q"))

    def induction_heads(self) -> list[str]:
        """From the second subject they attend to what followed the first."""
        return self.looking["induction"]

    def duplicate_token_heads(self) -> list[str]:
        """From the second subject they attend to the first."""
        return self.looking["duplicate token"]

    def previous_token_heads(self) -> list[str]:
        """From the token after the first subject they attend to it."""
        return self.looking["previous token"]

    def mean_attention(self, attention: Tensor, keys: Tensor) -> Tensor:
        """(layer, head): attention (pair, layer, head, key) to each pair's key, mean over pairs."""
        return attention[self.pairs.index, :, :, keys].mean(0).cpu()

    def chance_attention(self, attention: Tensor, queries: Tensor) -> float:
        """99th percentile, over draws of a key at or before each pair's query, of the best head's attention to it."""
        uniform = t.rand(self.shuffles, len(self.pairs), generator=self.generator).to(queries.device)
        drawn = (uniform * (queries + 1)).long()  # (shuffle, pair)
        best = [attention[self.pairs.index, :, :, keys].mean(0).max() for keys in drawn]
        return t.stack(best).quantile(0.99).item()

    def attention_elsewhere(self, attention: Tensor, queries: Tensor, places: tuple[str, ...]) -> Tensor:
        """
        (layer, head): 99th percentile, over draws of one of these places at or before each pair's query, of the head's
        mean attention to it; 0 where no pair has one.
        """
        keys = t.stack([position_of(self.pairs, place) for place in places], 1)  # (pair, place)
        allowed = (keys <= queries[:, None]).float().cpu()
        having = allowed.any(1).nonzero()[:, 0]  # the pairs that have one
        if len(having) == 0:
            return t.zeros(attention.shape[1:3])
        at_place = attention.cpu()[having[:, None], :, :, keys.cpu()[having]]  # (pair, place, layer, head)
        drawn = allowed[having].multinomial(
            self.shuffles, replacement=True, generator=self.generator
        )  # (pair, shuffle)
        weights = F.one_hot(drawn, len(places)).float() / len(having)
        means = einsum(weights, at_place, "pair shuffle place, pair place layer head -> shuffle layer head")
        return means.quantile(0.99, dim=0)

    def acting(self, heads: list[str], receivers: list[str], sign: int = 1) -> list[str]:
        """
        Those of the heads whose direct paths to the receivers help the metric (sign 1) or hurt it (-1), more than
        chance.
        """
        if not heads or not receivers:
            return []
        rows = [self.graph.writers.index(head) for head in self.graph.head_names]
        losses = path_losses(self.model, self.graph, self.pairs, receivers, self.metric, self.memory_gb, self.by)
        lost = losses[rows]  # (head, pair)
        bar = self.chance_loss(lost)
        effect = {head: sign * lost[self.graph.head_names.index(head)].mean() for head in heads}
        return [head for head in heads if effect[head] > bar]

    def chance_loss(self, lost: Tensor) -> Tensor:
        """99th percentile, over draws of a sign for each pair, of the best head's mean loss."""
        signs = t.randint(2, (self.shuffles, 1, len(self.pairs)), generator=self.generator) * 2.0 - 1
        return (signs * lost).mean(-1).amax(1).quantile(0.99)


def position_of(pairs: Pairs, place: str) -> Tensor:
    """The first position (pair) of a place; IO+1 is the one after IO."""
    after = place == "IO+1"
    return pairs.places["IO" if after else place].float().argmax(1) + after


def attention_from_places(model: nn.Module, graph: Graph, pairs: Pairs, memory_gb: float) -> dict[str, Tensor]:
    """{place that a role looks from: attention (pair, layer, head, key)} in clean runs."""
    names = [act_name("pattern", layer) for layer in range(graph.n_layers)]
    queries = list(dict.fromkeys(query for query, _ in ROLES.values()))
    n_pos = pairs.clean.shape[1]

    def look(group: Pairs) -> dict[str, Tensor]:
        _, cache = cache_from_resid(model, inputs(model, group, "clean"), group.answer_pos, names)
        shorter = n_pos - group.clean.shape[1]  # groups are cut after their last answer
        attention = {}
        for query in queries:
            position = position_of(group, query)
            rows = [cache[name][group.index, :, position].float() for name in names]
            attention[query] = F.pad(t.stack(rows, 1), (0, shorter))
        return attention

    n_pairs = rows_that_fit(model, n_pos, memory_gb, graph.n_layers * graph.n_heads * n_pos)
    parts = by_groups(look, pairs, n_pairs)
    return {query: t.cat([part[query] for part in parts]) for query in queries}
