"""Settings: what each field of a script's Config means, in which range it lies, and in which group --help shows it."""

import ast
import dataclasses
import functools
import inspect
import io
import math
import textwrap
import tokenize
from typing import Annotated, Any, get_args, get_type_hints

from utils import fail  # first: sets OpenMP's variables before torch is loaded

from annotated_types import Ge, GroupedMetadata, Gt, Le, Lt

# the groups of --help, in their order; a setting that is in none of them belongs to the method
GROUPS = {
    "model": "model models base release sae sae_id transcoders sae_ids skip hook bos dtype offload family tokenizer n_layers n_heads n_kv_heads "
    "d_model d_mlp d_expert d_state d_sae n_experts top_k shared positions rotary_share rope_base rms_eps qk_norm qkv_bias "
    "window norm_after expand d_conv dt_rank others architecture",
    "data": "data vocab english repeats task pairs clean corrupt answer wrong prompt prompts token n held_out heldout rows "
    "context labels text contrasts country positive negative target other judge direction",
    "method": "",
    "training": "steps tokens_per_step contexts context_steps accumulate lr muon_lr adamw_lr optimizer weight_decay "
    "schedule warmup decay clip autocast activation_checkpointing compile batch buffer dead_window",
    "output": "out export evaluate endpoint evaluator wandb open save_every resume checkpoints seed device memory_gb hpc",
    "cluster": "fsdp sweep slurm slurm_wait slurm_partition slurm_account slurm_constraint slurm_nodes slurm_gpus "
    "slurm_cpus slurm_mem slurm_time slurm_parallel",
}


def group_of(name: str) -> str:
    return next((group for group, names in GROUPS.items() if name in names.split()), "method")


#%% What a setting means: the comment beside it, or above it
@functools.cache
def meanings(config: type) -> dict[str, str]:
    """{field: its comment}; a field that a class declares anew without a word means what its parent says."""
    said: dict[str, str] = {}
    for kind in reversed(config.__mro__):
        if dataclasses.is_dataclass(kind):
            said |= comments_of(textwrap.dedent(inspect.getsource(kind)))
    return said


def comments_of(source: str) -> dict[str, str]:
    """{field: comment} of a dataclass's source: the lines above the field that hold nothing else, and the field's own."""
    words = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            words[token.start[0]] = token.string.removeprefix("#").strip()
    lines = source.splitlines()
    said = {}
    for field in ast.parse(source).body[0].body:
        if not isinstance(field, ast.AnnAssign):
            continue
        first = field.lineno
        while first - 1 in words and lines[first - 2].lstrip().startswith("#"):
            first -= 1
        comment = " ".join(words[line] for line in range(first, field.end_lineno + 1) if line in words)
        if comment:
            said[field.target.id] = comment
    return said


#%% In which range it lies, declared by its type (utils.Count ...)
def limits_of(hint: object) -> list:
    """The limits within a type: Annotated[int, Ge(1)], a tuple of them, or one of them or None."""
    limits = []
    for part in getattr(hint, "__metadata__", ()):
        limits += list(part) if isinstance(part, GroupedMetadata) else [part]
    for inner in get_args(hint):
        limits += limits_of(inner)
    return limits


def missed(value: object, limit: object) -> str:
    """What a value outside a limit must be; nothing where it lies inside."""
    if isinstance(limit, Ge) and not value >= limit.ge:
        return f"at least {limit.ge}"
    if isinstance(limit, Le) and not value <= limit.le:
        return f"at most {limit.le}"
    if isinstance(limit, Gt) and not value > limit.gt:
        return f"above {limit.gt}"
    if isinstance(limit, Lt) and not value < limit.lt:
        return f"below {limit.lt}"
    return ""


def check_ranges(cfg: object) -> None:
    """One line for a setting outside the range that its type declares, or that is no number."""
    hints = get_type_hints(type(cfg), include_extras=True)
    for field in dataclasses.fields(cfg):
        given = getattr(cfg, field.name)
        for value in given if isinstance(given, tuple) else [given]:
            said = f"--{field.name.replace('_', '-')} is {value}"
            if isinstance(value, float) and not math.isfinite(value):
                fail(f"{said}: give a number")
            if value is None or isinstance(value, str):
                continue
            for limit in limits_of(hints[field.name]):
                needed = missed(value, limit)
                if needed:
                    fail(f"{said}: it must be {needed}")


def in_range(hint: object) -> str:
    """'at least 1', 'from 0 to 1', or nothing, for --help."""
    bounds = {type(limit): limit for limit in limits_of(hint)}
    if Ge in bounds and Le in bounds:
        return f"from {bounds[Ge].ge} to {bounds[Le].le}"
    if Ge in bounds:
        return f"at least {bounds[Ge].ge}"
    if Gt in bounds:
        return f"above {bounds[Gt].gt}"
    return ""


#%% One dataclass of settings for each group, as tyro shows them; and back
def grouped(*parts: object) -> object:
    """Settings (dataclass instances, with their values as defaults) shared out to one dataclass a group."""
    import tyro

    fields: dict[str, list] = {group: [] for group in GROUPS}
    for part in parts:
        hints = get_type_hints(type(part), include_extras=True)
        said = meanings(type(part))
        for field in dataclasses.fields(part):
            text = "; ".join(filter(None, (said.get(field.name, ""), in_range(hints[field.name]))))
            kind = Annotated[hints[field.name], tyro.conf.arg(help=text)]
            value = getattr(part, field.name)
            fields[group_of(field.name)].append((field.name, kind, dataclasses.field(default=value)))
    groups = []
    for group, of_group in fields.items():
        if not of_group:
            continue
        order = GROUPS[group].split()
        of_group.sort(key=lambda field: order.index(field[0]) if field[0] in order else 0)
        kind = dataclasses.make_dataclass(group, of_group)
        groups.append((group, tyro.conf.OmitArgPrefixes[kind], dataclasses.field(default_factory=kind)))
    return dataclasses.make_dataclass("Settings", groups)()


def gathered[Part](settings: object, part: Part) -> Part:
    """The settings of part, as the groups have them now."""
    values: dict[str, Any] = {}
    for group in dataclasses.fields(settings):
        values |= vars(getattr(settings, group.name))
    return dataclasses.replace(part, **{field.name: values[field.name] for field in dataclasses.fields(part)})
