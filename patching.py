"""Causal interventions: activation patching, ablations, path patching, edge attribution and circuits, on our own models and any TransformerBridge."""

import time
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Literal

from utils import (
    WORLD,
    cyan,
    endc,
    fail,
    find_folder,
    gray,
    green,
    load_model,
    pick_device,
    purple,
    save_results,
    set_seed,
    yellow,
)
from plots import imshow, label_tokens, line, show
from hooks import act_name, hook_points, is_streamed, peak_bytes
from weights import about_bos, open_model, token_text
from data import load_corpus
from train import keep_freed_memory
from launch import flags
from world import judging_rows, load_world
from interventions import (
    HEADS,
    Part,
    STREAM,
    ablation_effects,
    baselines,
    draw_pairs,
    fine_parts,
    inputs,
    knock_out,
    make_metric,
    make_pairs,
    normalised,
    position_masks,
    read_pairs,
    sweep,
)
from graph import (
    Graph,
    WANG,
    area,
    edge_attribution,
    edge_patch,
    find_roles,
    self_repair,
    top_edges,
    trace_back,
    write_differences,
)
from llama_block import Llama

import numpy as np
import plotly.graph_objects as go
from tabulate import tabulate
import torch as t
from torch import Tensor
import torch.nn.functional as F

#%% Circuits: the strongest edges alone, everything else as in the corrupt run


def draw_circuit(graph: Graph, kept: Tensor, score: Tensor, title: str) -> go.Figure:
    """Layers from below, heads by number, the MLP at the right; an edge's colour is the input it enters, its width the score."""
    H, colors = graph.n_heads, {"q": "#0072B2", "k": "#D55E00", "v": "#009E73", "MLP": "#CC79A7", "logits": "#000000"}
    spots = {"embed": (H / 2, -1.0), "logits": (H / 2, 2.0 * graph.n_layers)} | {
        name: ((i % (H + 1)) + 0.5 * (i % (H + 1) == H), 2.0 * (i // (H + 1)) + (i % (H + 1) == H))
        for i, name in enumerate(graph.writers[1:])
    }
    fig, used = (
        go.Figure(
            [
                go.Scatter(x=[None], y=[None], mode="lines", line=dict(color=color, width=4), name=f"into {kind}")
                for kind, color in colors.items()
            ]
        ),
        {},
    )
    for w, r in kept.nonzero().tolist():
        (writer, reader), value = (graph.writers[w], graph.receivers[r]), score[w, r].item()
        ends = [spots[name] for name in (writer, reader.split(".")[0])]
        used |= {writer: ends[0], reader.split(".")[0]: ends[1]}
        look = dict(
            color=colors[reader.replace(" ", ".").split(".")[-1]],
            width=1 + 7 * abs(value) / score[kept].abs().max().item(),
            dash="solid" if value > 0 else "dot",
        )
        x, y = np.linspace(*ends, 3).T
        fig.add_trace(
            go.Scatter(
                x=x,
                y=y,
                mode="lines",
                opacity=0.6,
                line=look,
                showlegend=False,
                hovertemplate=f"{writer} to {reader}<br>score {value:.3f}<extra></extra>",
            )
        )
    x, y = zip(*used.values())
    fig.add_trace(
        go.Scatter(
            x=x,
            y=y,
            text=list(used),
            mode="markers+text",
            textposition="top center",
            marker=dict(size=16, color="#56B4E9"),
            showlegend=False,
            hovertemplate="%{text}<extra></extra>",
        )
    )
    return fig.update_layout(
        title=title,
        height=260 + 130 * graph.n_layers,
        xaxis=dict(title="head; at the right the MLP", tickvals=list(range(H))),
        yaxis=dict(
            title="layer",
            tickvals=[2 * l for l in range(graph.n_layers)],
            ticktext=[f"L{l}" for l in range(graph.n_layers)],
        ),
    )


#%% Settings: the shell sets them by flags, a notebook edits them here
@dataclass
class Config:
    model: str = "models/world"  # a hub name, a short name or a folder
    task: Literal["ioi", "capitals", "induction", "greater_than", "agreement", "gender"] = "ioi"
    clean: str | None = None  # a prompt of your own, with --corrupt, --answer and --wrong
    corrupt: str | None = None
    answer: str | None = None  # one token, with the space before it: " Paris"
    wrong: str | None = None
    pairs: str | None = None  # or many: a CSV or JSON file with the columns clean, corrupt, answer, wrong
    metric: Literal["logit_diff", "log_prob", "kl"] = "logit_diff"
    site: tuple[str, ...] = STREAM + HEADS  # activations to sweep
    positions: tuple[int, ...] = ()  # of the shown prompt; default all
    n: int = 32  # pairs to look at and to find the circuit on
    held_out: int = 100  # pairs to test it on
    ig_steps: int = 5
    offload: Literal["auto", "on", "off"] = (
        "auto"  # weights come block by block where they do not fit, always, never; then the stream alone is patched
    )
    data: str | None = (
        None  # text whose loss ablations are measured on: world, stdlib, a file or folder, a hub dataset; default world for models/world, else stdlib
    )
    memory_gb: float = 1.0  # cap on activations
    seed: int = 0
    device: str = "auto"
    bench: bool = False  # only compare the speed of sweeps with transformer_lens.patching


if __name__ == "__main__":
    cfg = flags(Config, __doc__, hpc=Config(model="gpt2", n=256, held_out=500, memory_gb=24.0))
    device = pick_device(cfg.device)
    set_seed(cfg.seed)

#%% Speed against transformer_lens.patching (--bench): the same sweeps, prompts and numbers, runs interleaved
if __name__ == "__main__" and cfg.bench:
    from transformer_lens import patching as theirs
    from transformer_lens.model_bridge import TransformerBridge
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
    from transformers import GPT2Config, GPT2LMHeadModel

    keep_freed_memory()
    hf, world, numbers, gaps = (
        GPT2LMHeadModel(GPT2Config()),
        load_model(str(WORLD), (Llama,), device).requires_grad_(False),
        {},
        [],
    )
    gpt2 = build_bridge_from_module(hf, "GPT2LMHeadModel", hf_config=hf.config).to(device).eval().requires_grad_(False)
    models = {
        "gpt2": (gpt2, gpt2),
        "world": (world, TransformerBridge.boot_transformers(str(WORLD), device=device).eval().requires_grad_(False)),
    }
    pool = draw_pairs(world, "ioi", 1000, cfg.seed)
    for name, n in product(models, (1, 32)):
        (ours, bridge), pairs = models[name], pool.take((pool.answer_pos == 14).nonzero()[:n, 0])
        for title, site, by, other in (
            ("resid_pre", "resid_pre", "pos", theirs.get_act_patch_resid_pre),
            ("head", "z", "head", theirs.get_act_patch_attn_head_out_all_pos),
        ):
            seconds, _, _ = [], sweep(ours, pairs, site, by), bridge.run_with_cache(pairs.clean)  # both are warm
            for _ in range(3 if n == 1 else 1):
                start = time.perf_counter()
                with t.no_grad():
                    reference = other(
                        bridge,
                        pairs.corrupt,
                        bridge.run_with_cache(pairs.clean)[1],
                        lambda logits: make_metric(pairs, "logit_diff")(logits[:, -1], pairs.index).mean(),
                    )
                middle = time.perf_counter()
                mine = sweep(ours, pairs, site, by, memory_gb=cfg.memory_gb).mean(-1)
                seconds.append((middle - start, time.perf_counter() - middle))
                gaps.append((mine - reference).abs().max().item())
            speedup = float(np.median([slow / fast for slow, fast in seconds]))
            print(
                f"{cyan}{name}, {n} IOI pair{'s' * (n > 1)} of 15 tokens, {title} sweep: {np.median(seconds, 0)[0]:.3f} s by transformer_lens, {np.median(seconds, 0)[1]:.3f} s here: {speedup:.1f} times as fast; largest difference so far {max(gaps):.0e}{endc}"
            )
            if n == 1:
                numbers[f"{title}_speedup_{name}"] = speedup
    peak = {
        n: peak_bytes(lambda: sweep(world, pool.take(slice(0, n)), "z", "head", memory_gb=cfg.memory_gb)) / 2**30
        for n in (32, 128, 512)
    }
    print(
        f"{cyan}world, head sweep, largest memory of tensors under the cap of {cfg.memory_gb:g} GB: {', '.join(f'{n} pairs {gb:.2f} GB' for n, gb in peak.items())}{endc}"
    )
    assert max(peak.values()) < cfg.memory_gb
    save_results("patching_bench", cfg, **numbers, max_abs_diff=max(gaps), peak_gigabytes=peak)
    raise SystemExit

#%% The model and the prompts: pairs that differ in one thing, some to look at, others to test on
if __name__ == "__main__":
    model = open_model(cfg.model, (Llama,), device, offload=cfg.offload).requires_grad_(False)
    own, say = (cfg.clean, cfg.corrupt, cfg.answer, cfg.wrong), lambda ids: [token_text(model, int(i)) for i in ids]
    if any(own) and not all(own):
        fail("a prompt of your own needs all of --clean, --corrupt, --answer and --wrong")
    task, given = (
        ("own pairs", read_pairs(cfg.pairs) if cfg.pairs else [own]) if cfg.pairs or any(own) else (cfg.task, [])
    )
    if len(given) == 1:
        print(f"{yellow}one pair: what is found is tested on the same pair{endc}")
    pairs, held = (
        make_pairs(model, given[i % len(given) :: 2]) if given else draw_pairs(model, task, n, cfg.seed + i)
        for i, n in enumerate((cfg.n, cfg.held_out))
    )
    if not (streamed := is_streamed(model)):
        keep_freed_memory()  # blocks that come and go would leave holes
    kind, graph, numbers, few, shown = (
        cfg.metric,
        None if streamed else Graph(model),
        {},
        pairs.take(slice(0, None, max(1, len(pairs) // 16))),
        pairs.take(slice(len(pairs) // 2, len(pairs) // 2 + 1)),
    )
    about, layers, heads, labels = (
        f"{task}, {Path(cfg.model).name}, {kind}",
        [f"L{l}" for l in range(model.cfg.n_layers)],
        [f"H{h}" for h in range(model.cfg.n_heads)],
        label_tokens(say(shown.clean[0])),
    )
    print(f"{purple}=== {about}: {len(pairs)} pairs, {len(held)} held out ==={endc}")
    print(
        f"{gray}clean   {''.join(say(shown.clean[0]))}\ncorrupt {''.join(say(shown.corrupt[0]))}\nanswer  {say(shown.answer)[0]!r}, wrong {say(shown.wrong)[0]!r}; {about_bos(model)}{endc}"
    )

#%% Baselines and gates: before a number is believed, patching nothing changes nothing, patching everything changes everything, and the writes add up
if __name__ == "__main__":
    (clean, corrupt), (held_clean, held_corrupt) = (baselines(model, x, kind, cfg.memory_gb) for x in (pairs, held))
    share, held_share = (
        partial(normalised, clean=a, corrupt=b) for a, b in ((clean, corrupt), (held_clean, held_corrupt))
    )
    share(clean)  # refuses equal metrics
    few_clean, few_corrupt = baselines(model, few, kind, cfg.memory_gb)
    with t.no_grad():
        logits = model(few.clean)[few.index, few.answer_pos]
    nothing, whole = (
        sweep(
            model,
            few,
            "resid_pre",
            kind=kind,
            places={"all": t.full_like(few.clean, on, dtype=t.bool)},
            memory_gb=cfg.memory_gb,
            skip=False,
        )
        for on in (False, True)
    )
    scale = 0.01 + (few_clean - few_corrupt).abs().max()
    misses = {
        "answer alone unembedded": make_metric(few, kind, logits)(logits, few.index) - few_clean,
        "nothing patched": nothing - few_corrupt,
        "everything patched": whole - few_clean,
    }
    if not streamed:
        gap, magnitude = write_differences(model, graph, few, cfg.memory_gb)
        none, every = edge_patch(model, graph, few, t.stack([~graph.upstream, graph.upstream]), kind, cfg.memory_gb)
        misses |= {
            "no edge patched": none - few_clean,
            "every edge patched": every - few_corrupt,
            "writes along the edges add up": gap * scale,
        }
    numbers |= {
        "clean": clean.mean().item(),
        "corrupt": corrupt.mean().item(),
        "gates": {title: (miss.abs().max() / scale).item() for title, miss in misses.items()},
    }
    print(
        f"{cyan}clean {clean.mean():.3f}, corrupt {corrupt.mean():.3f} (held out {held_clean.mean():.3f}, {held_corrupt.mean():.3f}); gates: {', '.join(f'{title} {miss:.0e}' for title, miss in numbers['gates'].items())}{endc}"
    )
    wrong = [
        title for title, miss in numbers["gates"].items() if miss > (1e-4 if model.W_U.dtype == t.float32 else 5e-2)
    ]
    if any("edge" not in title for title in wrong):
        fail(f"gate: {wrong[0]} misses; sweeps of this model cannot be believed")
    if wrong:
        print(
            f"{yellow}gate: {wrong[0]} misses: the writes of this model do not add up to its stream (a norm stands behind them), so paths and circuits are left out{endc}"
        )

#%% Where it happens: sweeps by layer and token of one pair, by layer and place of all pairs, by head
if __name__ == "__main__":
    print(f"{purple}=== Activation patching ==={endc}")
    if streamed and cfg.site == STREAM + HEADS:
        cfg = replace(cfg, site=("resid_pre", "resid_post"))
    if unknown := [site for site in cfg.site if act_name(site, 0) not in hook_points(model)]:
        fail(
            f"unknown hook {unknown[0]!r}: this model has no {act_name(unknown[0], 0)}; use some of {', '.join(STREAM + HEADS)}"
        )
    chosen, stream, by_head = (
        position_masks(shown, cfg.positions),
        [site for site in cfg.site if site not in HEADS],
        [site for site in cfg.site if site in HEADS],
    )
    if stream:
        cells = t.stack(
            [
                normalised(sweep(model, shown, site, "pos", kind, places=chosen), *baselines(model, shown, kind))
                for site in stream
            ]
        )
        show(
            imshow(
                cells,
                f"Clean activation into the corrupt run at one token (n = 1, {about}; 0 = corrupt, 1 = clean)",
                "token",
                "layer",
                [labels[int(p)] for p in chosen],
                layers,
                stream,
                columns=2,
                value="restored",
            ),
            "patching/tokens",
        )
        panels = {
            f"{site}, {direction}": share(
                sweep(model, pairs, site, "pos", kind, direction, pairs.places, cfg.memory_gb)
            )
            for site in stream
            for direction in ("denoise", "noise")
        }
        show(
            imshow(
                t.stack(list(panels.values())),
                f"Clean into corrupt (denoise), corrupt into clean (noise) by place (n = {len(pairs)}, {about}; 0 = corrupt, 1 = clean)",
                "place",
                "layer",
                list(pairs.places),
                layers,
                list(panels),
                columns=2,
                value="metric",
            ),
            "patching/places",
        )
        numbers |= {
            "by_place": {title: panel.tolist() for title, panel in panels.items()},
            "places": list(pairs.places),
        }
    if by_head:
        panels = {
            f"{site}, {direction}": share(sweep(model, pairs, site, "head", kind, direction, memory_gb=cfg.memory_gb))
            for site in by_head
            for direction in ("denoise", "noise")
        }
        wide = t.stack([panel.repeat_interleave(graph.n_heads // panel.shape[1], 1) for panel in panels.values()])
        show(
            imshow(
                wide,
                f"Patching by head (n = {len(pairs)}, {about}; 0 = corrupt, 1 = clean; heads that share keys show one value)",
                "head",
                "layer",
                heads,
                layers,
                list(panels),
                columns=4,
                value="metric",
            ),
            "patching/heads",
        )
        cells = share(
            sweep(model, pairs, by_head[0], "head pos", kind, places=pairs.places, memory_gb=cfg.memory_gb)
        ).flatten(0, 1)
        show(
            imshow(
                cells,
                f"Clean {by_head[0]} of one head into the corrupt run, by place (n = {len(pairs)}, {about})",
                "place",
                "head",
                list(pairs.places),
                graph.head_names[: len(cells)],
                value="restored",
            ),
            "patching/head_places",
        )
        numbers |= {"by_head": {title: panel.tolist() for title, panel in panels.items()}}

#%% Where the weights come block by block the story ends here: heads, MLPs and edges are not hooked
if __name__ == "__main__" and streamed:
    save_results("patching", cfg, **numbers)
    table = numbers["by_place"][f"{cfg.site[0]}, denoise"]
    best = [max(range(len(pairs.places)), key=lambda i: row[i]) for row in table]
    print(
        f"{green}At {cfg.site[0]} the answer stands at {' '.join(f'L{l} {list(pairs.places)[i]} {table[l][i]:.0%}' for l, i in enumerate(best))} (share of the metric that the clean stream there restores; the weights were streamed). Gates: the worst misses by {max(numbers['gates'].values()):.0e}.{endc}"
    )
    raise SystemExit

#%% Facts: noise on the subject's embeddings, restored by layer and place (ROME); and what the answer may not look at
if __name__ == "__main__" and task == "capitals":
    sigma, resid = 3 * model.W_E.float().std().item(), inputs(model, pairs, "clean")
    noised = replace(pairs, corrupt_resid=resid + sigma * t.randn_like(resid) * pairs.places["changed"][..., None])
    ends = baselines(model, noised, "log_prob")
    panels = {
        site: normalised(
            sweep(model, noised, site, "pos", "log_prob", places=pairs.places, memory_gb=cfg.memory_gb), *ends
        )
        for site in ("resid_post", "attn_out", "mlp_out")
    }
    show(
        imshow(
            t.stack(list(panels.values())),
            f"Causal tracing: subject noised by {sigma:.2f}, one clean activation restored (n = {len(pairs)}, {Path(cfg.model).name}, log-probability: 0 = noised {ends[1].mean():.2f}, 1 = clean {ends[0].mean():.2f} nats)",
            "place",
            "layer",
            list(pairs.places),
            layers,
            list(panels),
            columns=3,
            value="restored",
        ),
        "patching/tracing",
    )
    blind = {
        place: [
            normalised(knock_out(model, pairs, which, mask, "log_prob", cfg.memory_gb), *ends).item()
            for which in (*([l] for l in range(graph.n_layers)), range(graph.n_layers))
        ]
        for place, mask in pairs.places.items()
        if place != "end"
    }
    show(
        imshow(
            t.tensor(list(blind.values())),
            f"Attention from the answer's position knocked out (n = {len(pairs)}, {Path(cfg.model).name}, log-probability: 0 = subject noised, 1 = clean)",
            "layer",
            "to",
            [*layers, "all"],
            list(blind),
            value="metric left",
        ),
        "patching/knock_out",
    )
    subject = list(pairs.places).index("changed")
    numbers |= {
        "places": list(pairs.places),
        "tracing": {site: panel.tolist() for site, panel in panels.items()},
        "knock_out": blind,
    }
    print(
        f"{cyan}the clean subject after layer 0 restores {panels['resid_post'][0, subject]:.0%}, one MLP output there at most {panels['mlp_out'][:, subject].max():.0%}; without attention from the answer's position to the subject {blind['changed'][-1]:.2f} is left, to the words between {blind['between'][-1]:.2f} (1 = clean, 0 = subject noised){endc}"
    )

#%% What is needed: heads, MLPs, neurons and directions taken away, with the effect on the answer and on the loss over text
if __name__ == "__main__":
    print(f"{purple}=== Ablations ==={endc}")
    data = cfg.data or ("world" if find_folder(cfg.model) == str(WORLD) else "stdlib")
    rows = judging_rows(
        load_world() if data == "world" else load_corpus(data, tokenizer=find_folder(cfg.model)), 16, 64, cfg.seed
    ).to(device)
    names, sigmas = graph.writers[1:], [0.0, 0.25, 0.5, 1.0, 2.0, 4.0]
    parts = [
        part
        for l in range(graph.n_layers)
        for part in (
            *(
                Part("z", l, partial(t.mul, F.one_hot(t.tensor(h), graph.n_heads)[:, None].to(device)))
                for h in range(graph.n_heads)
            ),
            Part("mlp_out", l),
        )
    ]
    effects = {
        how: ablation_effects(model, few, rows, [(part, how, 1.0) for part in parts], kind, cfg.memory_gb)
        for how in ("zero", "mean", "resample", "noise")
    }
    where = f"n = {len(few)} prompts, {rows.numel()} held-out tokens of {data}, {about}; means and deviations over that text"
    for i, title in enumerate(("share of the metric lost", "nats per token of text lost")):
        show(
            imshow(
                t.tensor([[e[i] for e in effect] for effect in effects.values()]),
                f"Ablation: {title} ({where})",
                "part",
                "ablation",
                names,
                list(effects),
                value=title,
            ),
            f"patching/ablation_{('metric', 'loss')[i]}",
        )
    order = sorted(range(len(parts)), key=lambda i: -effects["mean"][i][0])
    strongest, mlp = (next(i for i in order if parts[i].site == site) for site in ("z", "mlp_out"))
    curves = {
        names[i]: [
            e[0]
            for e in ablation_effects(model, few, rows, [(parts[i], "noise", s) for s in sigmas], kind, cfg.memory_gb)
        ]
        for i in (strongest, mlp)
    }
    show(
        line(
            curves,
            f"Gaussian noise on the strongest head and MLP ({where})",
            "sigma (standard deviations)",
            "share of the metric lost",
            sigmas,
            markers=True,
        ),
        "patching/noise",
    )
    fine = fine_parts(model, few, parts[mlp].layer, cfg.memory_gb)
    lost = ablation_effects(model, few, rows, [(part, "mean", 1.0) for part in fine.values()], kind, cfg.memory_gb)
    table = [
        [names[i], *(f"{effects[how][i][0]:.2f} / {effects[how][i][1]:+.2f}" for how in effects)] for i in order[:8]
    ] + [[title, "", f"{a:.2f} / {b:+.2f}"] for title, (a, b) in zip(fine, lost)]
    print(tabulate(table, headers=["share of metric lost / nats added", *effects]))
    numbers |= {
        "ablation": {how: dict(zip(names, effect)) for how, effect in effects.items()},
        "noise_curve": curves,
        "fine_ablation": dict(zip(fine, lost)),
    }

#%% Backwards from the logits by path patching; and self-repair: what the strongest writers do directly, and who steps in when they fail
if __name__ == "__main__":
    if wrong:
        save_results("patching", cfg, **numbers)
        raise SystemExit
    print(f"{purple}=== Path patching ==={endc}")
    steps = {" ".join(receivers): losses for receivers, losses in trace_back(model, graph, few, kind, cfg.memory_gb)}
    show(
        imshow(
            t.stack(list(steps.values())),
            f"Exact path patching: metric lost when the path from a writer to these inputs is corrupt (n = {len(few)}, {about})",
            "writer",
            "inputs",
            graph.writers,
            list(steps),
            value="share lost",
        ),
        "patching/paths",
    )
    for title, losses in steps.items():
        print(
            f"{gray}into {title}: {cyan}{', '.join(f'{graph.writers[i]} {losses[i]:+.2f}' for i in losses.abs().topk(4).indices.tolist())}{endc}"
        )
    repair = []
    for head in sorted(graph.head_names, key=lambda head: -steps["logits"][graph.writers.index(head)])[:4]:
        alone, total, change = self_repair(model, graph, few, head, kind, cfg.memory_gb)
        repair.append(
            [
                head,
                alone,
                total,
                ", ".join(
                    f"{graph.writers[j]} {change[j]:+.2f}" for j in change.topk(2).indices.tolist() if change[j] > 0.05
                ),
            ]
        )
    print(
        tabulate(
            repair,
            headers=["set to its mean", "lost directly", "lost in all", "steps in (direct effect, logits)"],
            floatfmt=".2f",
        )
    )
    numbers |= {
        "paths": {title: dict(zip(graph.writers, losses.tolist())) for title, losses in steps.items()},
        "self_repair": repair,
    }

#%% Indirect objects: which roles of GPT-2's circuit exist in this model, each against a permutation null
if __name__ == "__main__" and {"IO", "S1", "S1+1", "S2"} <= held.places.keys():
    scores, bars, found = find_roles(model, graph, held, kind, cfg.memory_gb)
    show(
        imshow(
            t.stack(list(scores.values())),
            f"Attention of each role (n = {len(held)} held-out pairs, {about}; bars {', '.join(f'{role} {bar:.2f}' for role, bar in bars.items())})",
            "head",
            "layer",
            heads,
            layers,
            list(scores),
            columns=3,
            diverging=False,
            value="attention",
        ),
        "patching/roles",
    )
    table = [
        [
            role,
            " ".join(found[role]) or "none",
            f"{graph.head_names[int(score.argmax())]} {score.max():.2f}",
            bars[role],
            *[WANG[role]] * (Path(cfg.model).name in ("gpt2", "gpt2-small")),
        ]
        for role, score in scores.items()
    ]
    print(
        tabulate(
            table,
            headers=["role", "heads", "most attention", "bar", "Wang et al. (2023)"][: len(table[0])],
            floatfmt=".2f",
        )
    )
    numbers |= {
        "roles": found,
        "role_bars": bars,
        "role_scores": {role: score.tolist() for role, score in scores.items()},
    }

#%% Edges: attribution by gradient and along a path of gradients, against the truth
if __name__ == "__main__":
    print(f"{purple}=== Edges and circuits ==={endc}")
    start = time.perf_counter()
    ranking = {"EAP-IG": edge_attribution(model, graph, pairs, kind, cfg.ig_steps, cfg.memory_gb)}
    numbers["edge_attribution_seconds"] = time.perf_counter() - start
    ranking |= {
        "EAP": edge_attribution(model, graph, pairs, kind, 0, cfg.memory_gb),
        "magnitude": magnitude[:, None].expand(graph.upstream.shape),
        "random": t.rand(graph.upstream.shape),
    }
    total, picked = (
        int(graph.upstream.sum()),
        top_edges(graph, t.rand(graph.upstream.shape), [500])[0].nonzero(),
    )  # at most 500 are patched one by one
    single = t.zeros(len(picked), *graph.upstream.shape, dtype=t.bool)
    single[range(len(picked)), picked[:, 0], picked[:, 1]] = True
    truth = (few_clean - edge_patch(model, graph, few, single, kind, cfg.memory_gb)).mean(-1).cpu()
    estimates = {
        method: edge_attribution(model, graph, few, kind, steps, cfg.memory_gb)[picked[:, 0], picked[:, 1]]
        for method, steps in (("EAP-IG", cfg.ig_steps), ("EAP", 0))
    }
    correlation = {method: t.corrcoef(t.stack([truth, x]))[0, 1].item() for method, x in estimates.items()}
    fig = go.Figure(
        [
            go.Scatter(
                x=truth,
                y=x,
                mode="markers",
                name=f"{method}, correlation {correlation[method]:.2f}",
                text=[f"{graph.writers[w]} to {graph.receivers[r]}" for w, r in picked.tolist()],
                hovertemplate="%{text}<br>patched %{x:.3f}<br>estimated %{y:.3f}<extra></extra>",
            )
            for method, x in estimates.items()
        ]
    )
    show(
        fig.update_layout(
            title=f"Metric lost by an edge, patched and estimated ({len(picked)} of {total} edges, n = {len(few)}, {about})",
            xaxis_title="lost by patching",
            yaxis_title="estimated",
        ),
        "patching/attribution",
    )
    numbers |= {
        "attribution_correlation": correlation["EAP-IG"],
        "attribution_correlation_eap": correlation["EAP"],
        "node_attribution": dict(zip(graph.writers, ranking["EAP-IG"].sum(1).tolist())),
    }
    print(
        f"{cyan}{total} edges attributed in {numbers['edge_attribution_seconds']:.1f} s (EAP-IG, {cfg.ig_steps} steps, {len(pairs)} pairs); correlation with patching {len(picked)} of them: EAP-IG {correlation['EAP-IG']:.2f}, EAP {correlation['EAP']:.2f}{endc}"
    )

#%% The circuit: the fewest edges that keep the behaviour, found on some pairs and tested on others, beside random circuits of its size
if __name__ == "__main__":
    grid = [0.0, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.13, 0.16, 0.2, 0.3, 0.5, 1.0]
    sizes, keep = (
        [round(x * total) for x in grid],
        lambda where, masks: edge_patch(model, graph, where, ~masks, kind, cfg.memory_gb),
    )
    ladders = {method: top_edges(graph, score, sizes) for method, score in ranking.items()}
    circuit = graph.prune(ladders["EAP-IG"][int((share(keep(pairs, ladders["EAP-IG"])) >= 0.9).nonzero()[0])])
    curves = {method: keep(held, masks) for method, masks in ladders.items()}
    areas = {method: area(values, held_clean, held_corrupt, grid) for method, values in curves.items()}
    lines = {f"{method} (area {areas[method][0]:.2f})": held_share(values) for method, values in curves.items()} | {
        "all but the EAP-IG edges (completeness)": held_share(keep(held, ~ladders["EAP-IG"]))
    }
    show(
        line(
            lines,
            f"Faithfulness against edges kept (n = {len(held)} held-out pairs, {about}; 0 = corrupt, 1 = clean)",
            "share of edges",
            "metric kept",
            grid,
            markers=True,
            dashed=list(lines)[2:],
        ),
        "patching/faithfulness",
    )
    size, rivals = (
        int(circuit.sum()),
        t.cat([top_edges(graph, t.rand(graph.upstream.shape), [int(circuit.sum())]) for _ in range(10)]),
    )
    faithfulness, complement, *random = held_share(keep(held, t.cat([t.stack([circuit, ~circuit]), rivals]))).tolist()
    show(
        draw_circuit(
            graph,
            circuit,
            ranking["EAP-IG"],
            f"{size} of {total} edges keep {faithfulness:.0%} ({about}, found on {len(pairs)} pairs by EAP-IG, n = {len(held)} held-out pairs; dotted: against the answer)",
        ),
        "patching/circuit",
    )
    numbers |= {
        "circuit_faithfulness": faithfulness,
        "circuit_edges": size,
        "circuit_edges_total": total,
        "circuit_complement": complement,
        "random_circuit_faithfulness": float(np.mean(random)),
        "random_circuit_faithfulness_max": max(random),
    }
    numbers |= {
        "eap_ig_faithfulness": areas["EAP-IG"][0],
        "eap_faithfulness": areas["EAP"][0],
        "areas": areas,
        "circuit": [f"{graph.writers[w]} to {graph.receivers[r]}" for w, r in circuit.nonzero().tolist()],
    }
    for method, (value, low, high) in areas.items():
        print(
            f"{cyan}area under faithfulness, {method}: {value:.3f} ({low:.3f} to {high:.3f}, 95% over {len(held)} pairs){endc}"
        )

#%% The numbers for machines, and the conclusion
if __name__ == "__main__":
    save_results("patching", cfg, **numbers)
    worse, better = sorted(("EAP", "EAP-IG"), key=lambda method: areas[method][0])
    ranked, inside = (
        f"{better} ranks edges best"
        if areas[better][1] > areas[worse][2]
        else "EAP and EAP-IG rank edges alike, within their intervals",
        [w for i, w in enumerate(graph.writers) if circuit[i].any()],
    )
    if "roles" in numbers:
        print(
            f"{green}Of the roles in GPT-2's circuit this model has {'; '.join(f'{role} {chr(32).join(names)}' for role, names in found.items() if names) or 'none'}; none is {', '.join(role for role, names in found.items() if not names) or 'missing'}.{endc}"
        )
    print(
        f"{green}{size} of {total} edges ({size / total:.0%}; {' '.join(inside)}) keep {faithfulness:.0%} of the metric on {len(held)} held-out pairs, as many random edges {np.mean(random):.0%}, all the others {complement:.0%}; {ranked} (areas {areas['EAP-IG'][0]:.3f} by EAP-IG, {areas['EAP'][0]:.3f} by EAP). Gates: the worst misses by {max(numbers['gates'].values()):.0e}.{endc}"
    )
