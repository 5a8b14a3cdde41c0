"""Every file can be imported without effect, and imports go one way, as DESIGN says."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter

import pytest
from conftest import ROOT

STAGES = {"model", "fineweb", "train_gpt2", "hellaswag", "sample", "plot", "recipes"}
SCRIPTS = {path.stem for path in ROOT.glob("*.py")}
COMMON = {f"common.{path.stem}" for path in (ROOT / "common").glob("*.py") if path.stem != "__init__"}
BENCHMARKS = {f"benchmarks.{path.stem}" for path in (ROOT / "benchmarks").glob("*.py") if path.stem != "__init__"}
OURS = SCRIPTS | COMMON
ORDER = sorted(OURS | BENCHMARKS)


def tree(module):
    return ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))


def nodes_outside_functions(node):
    """The statements that run when a file is imported, but for those under `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        yield child
        yield from nodes_outside_functions(child)


def imported_names(nodes):
    """What these nodes import, as `module` or `module.name`."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def names_imported_by(module):
    """What a file imports, in its functions too."""
    return imported_names(ast.walk(tree(module)))


def our_modules(names):
    """Which of our modules are among imported names."""
    return {ours for ours in OURS for name in names if name == ours or name.startswith(f"{ours}.")}


def libraries(names):
    return {name.split(".")[0] for name in names}


def test_the_stages_are_the_scripts_that_design_lists():
    assert SCRIPTS - {"check"} == STAGES


@pytest.mark.parametrize("module", ORDER)
def test_a_file_imports_what_its_place_allows(module):
    names = names_imported_by(module)
    imported = our_modules(names)
    if module in COMMON:
        allowed = COMMON | ({"model"} if module == "common.huggingface" else set())
    elif module == "model":
        allowed = {"common.tokenizer"}
    elif module in BENCHMARKS | {"train_gpt2", "check"}:
        allowed = OURS
    else:
        allowed = COMMON | {"model"}
    assert imported <= allowed
    assert not any(name.startswith(("tests", "conftest")) for name in names)
    assert not any(name.startswith("benchmarks") for name in names) or module in BENCHMARKS | {"check"}


def test_the_network_knows_torch_and_two_constants_of_ours_alone():
    names = names_imported_by("model")
    constants = {name for name in names if our_modules({name})}
    assert constants <= {"common.tokenizer.N_TOKENS", "common.tokenizer.END_OF_TEXT"}
    assert libraries(names - constants) - set(sys.stdlib_module_names) == {"torch"}


def names_made_in(module):
    """The functions, classes and variables of a file's top level."""
    names = set()
    for node in nodes_outside_functions(tree(module)):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names | {node.name for node in tree(module).body if isinstance(node, ast.FunctionDef | ast.ClassDef)}


@pytest.mark.parametrize("module", ORDER)
def test_a_name_is_imported_from_the_file_that_makes_it(module):
    for name in names_imported_by(module):
        origin, _, imported = name.rpartition(".")
        if origin in OURS:
            assert imported in names_made_in(origin), name


def test_no_module_imports_itself_through_others():
    graph = {module: our_modules(names_imported_by(module)) - {module} for module in OURS}
    TopologicalSorter(graph).prepare()  # raises CycleError


def reached_from(module):
    """The module and what it imports when it is imported, directly and through others of ours."""
    reached, waiting = set(), {module}
    while waiting:
        reached |= waiting
        nodes = [node for one in waiting for node in nodes_outside_functions(tree(one))]
        waiting = our_modules(imported_names(nodes)) - reached
    return reached


@pytest.mark.parametrize(
    "module", ["fineweb", "plot", "common.shards", "common.log", "common.reference", "common.tokenizer", "common.files"]
)
def test_what_handles_text_and_files_imports_no_torch_even_through_others(module):
    for reached in reached_from(module):
        names = imported_names(nodes_outside_functions(tree(reached)))
        assert not {"torch", "transformers", "safetensors"} & libraries(names), reached


def test_torch_is_in_the_log_only_for_tensorboards_writer_and_nowhere_in_shards_and_fineweb():
    torch_names = {
        m: {n for n in names_imported_by(m) if "torch" in n} for m in ("common.log", "common.shards", "fineweb")
    }
    assert torch_names == {
        "common.log": {"torch.utils.tensorboard.SummaryWriter"},
        "common.shards": set(),
        "fineweb": set(),
    }


def test_the_program_needs_no_transformers():
    for module in OURS:
        assert "transformers" not in libraries(names_imported_by(module)), module


def test_no_private_names_of_libraries_are_imported():
    for module in ORDER:
        for name in names_imported_by(module):
            assert not any(part.startswith("_") for part in name.split(".")) or name.startswith("__future__"), name


def test_no_pickle_and_no_code_from_a_string():
    forbidden = {"torch.save", "torch.load", "exec", "eval"}
    for module in ORDER:
        assert not {"pickle", "dill", "joblib", "shelve", "marshal"} & libraries(names_imported_by(module)), module
        for node in ast.walk(tree(module)):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            assert called not in forbidden, module
            assert "allow_pickle" not in [k.arg for k in getattr(node, "keywords", [])], module


IMPORT_ALL = """
import os, random, sys, threading
import matplotlib, numpy, torch
def state():
    return (sorted(os.listdir()), dict(os.environ), threading.active_count(), random.getstate(),
            os.times().children_user, torch.get_rng_state().tolist(), torch.get_num_threads(),
            torch.get_float32_matmul_precision(), torch.get_default_dtype(), torch.is_grad_enabled(),
            str(numpy.random.get_state()), torch.cuda.is_initialized(), torch.distributed.is_initialized())
before = state()
for name in sys.argv[2:]:
    __import__(name)
assert state() == before
assert sys.modules["common.tokenizer"].encoding.cache_info().currsize == 0
assert "matplotlib.pyplot" not in sys.modules and "transformers" not in sys.modules and "datasets" not in sys.modules
"""


def test_importing_every_file_has_no_effect(tmp_path):
    program = f"import sys; sys.path.insert(0, sys.argv[1])\n{IMPORT_ALL}"
    command = [sys.executable, "-c", program, str(ROOT), *sorted(OURS)]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0 and not finished.stdout and not finished.stderr, finished.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("module", sorted(BENCHMARKS))
def test_a_benchmark_can_be_imported_without_touching_the_path(module):
    assert "sys.path" not in ast.unparse(tree(module))
