"""How the house is built: imports run one way, nothing imports a story, and an architecture can be read alone."""

import ast
import re
from pathlib import Path

import pytest
from conftest import ROOT

FOUNDATIONS = (  # from below: each may import those before it
    "utils",
    "settings",
    "report",
    "plots",
    "hooks",
    "layers",
    "data",
    "weights",
    "hooked",
    "train",
    "launch",
    "information",
    "logit_attribution",
    "neurons",
    "heads",
    "norm_maps",
    "parts",
    "world",
    "lens",
    "study",
    "pairs",
    "interventions",
    "ablations",
    "graph",
    "path_patching",
    "eap",
    "circuit_search",
    "roles",
    "sae",
    "features",
    "probes",
    "alignment",
    "directions",
    "transcoders",
    "attribution_graph",
)
ARCHITECTURES = (
    "attn_only",
    "tiny_transformer",
    "llama_block",
    "moe",
    "mamba",
)  # their classes are imported, their cells are not
STORIES = sorted(path.stem for path in ROOT.glob("*.py") if path.stem not in (*FOUNDATIONS, *ARCHITECTURES))
MODEL_ROOMS = {"utils", "hooks", "hooked", "layers", "weights"}


def tree(name: str) -> ast.Module:
    return ast.parse((ROOT / f"{name}.py").read_text())


def imported(name: str) -> dict[str, set[str]]:
    """{module of ours: names taken from it}, wherever in the file."""
    ours: dict[str, set[str]] = {}
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.ImportFrom) and (ROOT / f"{node.module}.py").exists():
            ours.setdefault(node.module, set()).update(alias.name for alias in node.names)
        if isinstance(node, ast.Import):
            for alias in node.names:
                if (ROOT / f"{alias.name}.py").exists():
                    ours.setdefault(alias.name, set())
    return ours


def test_every_file_has_its_place():
    assert "bench" in STORIES and "patching" in STORIES and len(STORIES) == len(set(STORIES))
    assert all((ROOT / f"{name}.py").exists() for name in (*FOUNDATIONS, *ARCHITECTURES))


@pytest.mark.parametrize("name", FOUNDATIONS)
def test_a_foundation_imports_what_stands_below_it(name):
    below = FOUNDATIONS[: FOUNDATIONS.index(name)]
    assert set(imported(name)) <= set(below)


@pytest.mark.parametrize("name", [*ARCHITECTURES, *STORIES])
def test_nothing_imports_a_story_and_of_an_architecture_only_its_model(name):
    for module, names in imported(name).items():
        assert module in (*FOUNDATIONS, *ARCHITECTURES), f"{name} imports the story {module}"
        if module in ARCHITECTURES:
            source = (ROOT / f"{module}.py").read_text()
            model_half = source[: source.index("#%% Settings")]
            for wanted in names:
                assert re.search(rf"^(class|def) {wanted}\b|^{wanted} = ", model_half, re.M), f"{module}.{wanted}"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_model_class_uses_only_the_rooms_beneath_a_model(name):
    """The classes of an architecture name nothing of training, data or drawing; saving and the tokenizer stand in data."""
    module = tree(name)
    origin = {}
    for node in module.body:
        if isinstance(node, ast.ImportFrom) and (ROOT / f"{node.module}.py").exists():
            origin |= {alias.name: node.module for alias in node.names}
    allowed = MODEL_ROOMS | {"data"} | ({"llama_block"} if name == "moe" else set())
    for node in module.body:
        if isinstance(node, ast.ClassDef) and any("nn.Module" in ast.unparse(base) for base in node.bases):
            used = {x.id for x in ast.walk(node) if isinstance(x, ast.Name)}
            rooms = {origin[x] for x in used if x in origin}
            assert rooms <= allowed, f"{name}.{node.name} uses {rooms - allowed}"


@pytest.mark.parametrize("name", FOUNDATIONS)
def test_a_foundation_runs_nothing_when_it_is_imported(name):
    for node in tree(name).body:
        assert not isinstance(node, (ast.For, ast.While, ast.With, ast.If)), f"{name}: line {node.lineno}"
        if isinstance(node, ast.Expr):
            is_text = isinstance(node.value, ast.Constant)
            sets_openmp = name == "utils" and "os.environ.setdefault" in ast.unparse(node)
            assert is_text or sets_openmp, f"{name}: line {node.lineno}"


def in_order(name: str) -> list[str]:
    """The modules that a file imports at its top, one after the other."""
    imports = [node for node in tree(name).body if isinstance(node, (ast.ImportFrom, ast.Import))]
    return [node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in imports]


def begins_with_utils(name: str) -> bool:
    """Whether the first file of ours that it imports is utils, or one that begins with utils; if it imports any."""
    if name == "utils":
        return True
    ours = [module for module in in_order(name) if (ROOT / f"{module}.py").exists()]
    return not ours or begins_with_utils(ours[0])


def test_utils_comes_first_wherever_it_is_imported():
    """It sets OpenMP's variables, which torch reads when it is loaded."""
    for path in ROOT.glob("*.py"):
        if path.stem == "utils":
            continue
        modules = in_order(path.stem)
        assert begins_with_utils(path.stem), path.name
        first = next((i for i, module in enumerate(modules) if (ROOT / f"{module}.py").exists()), 0)
        assert "torch" not in [module.split(".")[0] for module in modules[:first]], path.name


def test_no_file_stands_in_the_way_of_a_reader():
    """A line of code holds one statement, and no function is longer than two screens."""
    for path in [*ROOT.glob("*.py"), *Path(ROOT / "tests").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                assert node.end_lineno - node.lineno <= 110, f"{path.name}: {node.name}"
            body = getattr(node, "body", None)
            if isinstance(body, list):
                lines = [child.lineno for child in body]
                assert len(lines) == len(set(lines)), f"{path.name}: line {lines}"
