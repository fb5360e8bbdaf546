"""What every method owes, on both workloads: each test runs over all that the folder holds, a new file too."""

import copy
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import cladapt
import cladapt_kernels
from cladapt.artifacts import read_tensors, write_tensors
from cladapt.config import AdapterConfig, MethodConfig, VitConfig, describe
from cladapt.data.images import ImageStream
from cladapt.methods import Compose, Context, Method, available, build
from cladapt.methods.finetune import Finetune
from cladapt.model.adapter import adapted_lm, adapter_parameters, adapter_tensors, create_adapter
from cladapt.model.load import load_base, new_model, save_base, trie_softmax
from cladapt.model.packed import PackedLoss
from cladapt.model.saved import load_adapter, place, save_adapter
from cladapt.model.vit import ClassLoss, load_vision_base, new_vit, save_vision_base
from cladapt.tokens.prompts import Document
from cladapt.tokens.sids import SidTable
from cladapt.tokens.trie import Trie
from cladapt.train.checkpoint import load_checkpoint, save_checkpoint
from cladapt.train.classes import ImageFeed, learned_rows
from cladapt.train.feeds import PackedFeed
from cladapt.train.loop import Fit, FitSettings
from cladapt.train.sinks import JsonlSink, MemorySink, Sink
from cladapt.train.targets import PackedTargets

METHODS = available()
LEARNING = sorted(name for name, kind in METHODS.items() if kind.trains)
FLATTENED: dict[str, dict[str, Any]] = {
    **{f"{name}+eisam": {} for name in LEARNING if name != "eisam" and METHODS[name].parameters != "weights"},
    "eisam, by item": {"groups": "item"},
    "eisam, by batch": {"groups": "batch", "weights": "uniform", "strength": 1.0},
    "eisam, the tail": {"groups": "batch", "weights": "tail", "tail": 8, "strength": 1.0},
    "eisam, reused": {"refresh": 3},
    "eisam, the largest half": {"share": 0.5},
    "eisam, the last layer": {"layers": 1},
    "eisam, exact": {"targets": "exact", "groups": "item"},
    "eisam, weights alone": {"perturb": False},
}
PROXIMAL = sorted(name for name in LEARNING if "strength" in METHODS[name].Config.model_fields)
SIDS = SidTable(tuple(f"i{k}" for k in range(12)), np.array([[k // 3, k % 3] for k in range(12)]), (4, 3))
SETTINGS = FitSettings(lr=2e-3, epochs=2, seed=0)
PROBES = {
    "recommend": torch.tensor([[1, 4, 9, 5, 8, 6, 10, 7, 8]]),
    "classify": torch.linspace(-1, 1, 64).view(1, 1, 8, 8),
}
TARGETS = {"recommend": ("q_proj", "v_proj", "down_proj", "lm_head"), "classify": ("q_proj", "v_proj", "fc2")}

every_method = pytest.mark.parametrize("name", sorted(METHODS))
every_learner = pytest.mark.parametrize("name", LEARNING)
every_flattened = pytest.mark.parametrize("name", FLATTENED)


@pytest.fixture(scope="module", params=["recommend", "classify"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, in a folder with the name of its workload."""
    path = tmp_path_factory.mktemp("base") / request.param
    if request.param == "recommend":
        save_base(path, *new_model("tiny", SIDS, seed=0), SIDS, {"fitted_block": 1})
    else:
        model = new_vit(VitConfig(hidden=32, layers=2, patch=2), 8, 1, 9)
        save_vision_base(path, model, "nine", {"fitted_block": 1, "stream": ""})
    return path


def make(name: str, **options: Any) -> Method:
    return build(MethodConfig(name=name, options=options))


def flattened(name: str) -> Method:
    """A method of `FLATTENED`, perturbed from the first step on, and far."""
    joined, _, what = name.partition(", ")
    far = {} if "perturb" in FLATTENED[name] else {"warmup": 0.0, "radius": 0.5}
    options = {**far, **FLATTENED[name]}
    return make(joined, **{key if what else f"eisam.{key}": value for key, value in options.items()})


def histories(block: int, count: int, seed: int) -> np.ndarray:
    """Items that go on by a step of their block's own, with some noise."""
    rng = np.random.default_rng([block, seed])
    items = rng.integers(12, size=(count, 1)) + block * np.arange(6)
    return np.where(rng.random(items.shape) < 0.2, rng.integers(12, size=items.shape), items) % 12


def image_stream() -> ImageStream:
    """Nine classes in three blocks: a bright square at the class's place, in noise."""
    rng = np.random.default_rng(0)
    label = np.repeat(np.arange(9), 12)
    images = rng.integers(0, 120, size=(len(label), 8, 8, 1))
    for row, c in enumerate(label):
        images[row, 2 * (c // 3) : 2 * (c // 3) + 3, 2 * (c % 3) : 2 * (c % 3) + 3] += 120
    split = np.tile([0] * 8 + [1] * 3 + [2], 9).astype(np.int8)
    return ImageStream(images.astype(np.uint8), label, split, tuple("abcdefghi"), np.repeat([1, 2, 3], 3))


def base_of(folder: Path) -> Any:
    return (load_base if folder.name == "recommend" else load_vision_base)(folder)


class Learner:
    """A base with an adapter that has left its start, and a method that adapts it to one block after the other."""

    def __init__(self, folder: Path, method: Method, dropout: float = 0.0) -> None:
        self.workload = folder.name
        self.base = base_of(folder)
        self.method = method
        config = AdapterConfig(rank=2, dropout=dropout, targets=TARGETS[self.workload])
        self.model = create_adapter(self.base, config, 0, method.parameters, by_item=method.flattens)
        generator = torch.Generator().manual_seed(1)
        self.initial = {name: p.detach().clone() for name, p in adapter_parameters(self.model).items()}
        with torch.no_grad():
            for p in adapter_parameters(self.model).values():
                p += 0.05 * torch.randn(p.shape, generator=generator)
        for p in self.base.extra_parameters.values():
            p.requires_grad_(True)

    def tensors(self) -> dict[str, Tensor]:
        """What an adapter directory would hold."""
        extra = {name: p.detach().clone() for name, p in self.base.extra_parameters.items()}
        return adapter_tensors(self.model) | extra

    def set(self, tensors: Mapping[str, Tensor]) -> None:
        place(self.model, self.base, tensors)

    def fit(self, block: int, sink: Sink | None = None, batch_tokens: int = 96, **changes: Any) -> Fit:
        module, feed = (self._interactions if self.workload == "recommend" else self._images)(block, batch_tokens)
        ctx = replace(Context.of(self.model, block, self.initial), extra_parameters=self.base.extra_parameters)
        return Fit(module, self.method, ctx, feed, replace(SETTINGS, **changes), sink or MemorySink())

    def _interactions(self, block: int, batch_tokens: int) -> tuple[Any, Any]:
        tokens, bos = self.base.item_tokens().numpy(), self.base.bos()
        past = [(b, str(i)) for b in range(1, block) for i in range(17)]
        again = [past[i] for i in self.method.replay.take(past, 0)] if self.method.replay else []
        rows = [*histories(block, 17, 0), *(histories(b, 17, 0)[int(i)] for b, i in again)]
        train, valid = (
            [Document(np.r_[bos, tokens[row].ravel()], np.arange(13) > 2) for row in each]
            for each in (rows, histories(block, 5, 1))
        )
        loss = PackedLoss(adapted_lm(self.model), trie_softmax(self.base, Trie.build(SIDS.codes)))
        items = PackedTargets(tokens, np.bincount(histories(block, 17, 0).ravel(), minlength=len(tokens)))
        return loss, PackedFeed(train, valid, batch_tokens, 32, items)

    def _images(self, block: int, batch_tokens: int) -> tuple[Any, Any]:
        stream = image_stream()
        rows = learned_rows(stream, (block,), self.method.replay, 0)[:-1]
        feed = ImageFeed(stream, rows, stream.rows(block, "valid"), batch_tokens // 13)
        return ClassLoss(adapted_lm(self.model), np.unique(stream.label[rows]), stream.seen(block - 1)), feed


def learned(folder: Path, method: Method, blocks: tuple[int, ...] = (2, 3), **changes: Any) -> dict[str, Tensor]:
    learner = Learner(folder, method, dropout=0.1)
    for block in blocks:
        learner.fit(block, **changes).run()
    return learner.tensors()


def equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(t, other[n]) and t.dtype == other[n].dtype for n, t in one.items()
    )


@every_method
def test_the_file_tells_what_the_method_is(name: str) -> None:
    kind = METHODS[name]
    doc = sys.modules[kind.__module__].__doc__ or ""
    assert doc.splitlines()[0].strip()
    assert "\nState: " in doc
    assert all(row["meaning"] for row in describe(kind.Config()))


@pytest.mark.parametrize("name", sorted(set(METHODS) - set(LEARNING)))
def test_a_method_that_does_not_train_touches_nothing(name: str, folder: Path) -> None:
    method = make(name)
    learner = Learner(folder, method)
    fit = learner.fit(2)
    before = learner.tensors()
    method.begin_block(fit.ctx)
    assert method.loss_terms(fit.ctx, None, torch.ones(())) == {}
    method.edit_grads(fit.ctx)
    method.after_step(fit.ctx)
    method.end_block(fit.ctx)
    assert equal(learner.tensors(), before)
    assert all(p.grad is None for p in fit.ctx.parameters.values())
    assert method.state_dict() == {}
    assert method.state_bytes(fit.ctx.parameters) == 0


@pytest.mark.parametrize("name", PROXIMAL)
def test_zero_strength_is_fine_tuning_bit_for_bit(name: str, folder: Path) -> None:
    assert equal(learned(folder, make(name, strength=0.0)), learned(folder, make("finetune")))


@pytest.mark.parametrize("name", sorted(set(LEARNING) - {"finetune"}))
def test_a_method_does_something(name: str, folder: Path) -> None:
    assert not equal(learned(folder, make(name)), learned(folder, make("finetune")))


@every_learner
def test_the_declared_state_is_the_measured_one(name: str, folder: Path) -> None:
    learner = Learner(folder, make(name))
    for block in (1, 2, 3):
        fit = learner.fit(block, epochs=1)
        learner.method.begin_block(fit.ctx)
        state = learner.method.state_dict()
        measured = sum(t.numel() * t.element_size() for t in state.values())
        assert learner.method.state_bytes(fit.ctx.parameters) == measured
        fit.run()


@every_learner
def test_the_state_goes_through_a_file_into_a_fresh_instance(name: str, folder: Path, tmp_path: Path) -> None:
    first = Learner(folder, make(name))
    fit = first.fit(2)
    first.method.begin_block(fit.ctx)
    *before, last = fit.steps(0)
    for step in before:
        fit.step(step, 0.2)
    write_tensors(tmp_path / "state.safetensors", first.method.state_dict())
    state = read_tensors(tmp_path / "state.safetensors")
    assert equal(state, first.method.state_dict())

    # the same model and optimiser, but a method that knows only the file
    second = Learner(folder, make(name))
    other = second.fit(2)
    second.set({n: 1.1 * t for n, t in first.tensors().items()})
    second.method.begin_block(other.ctx)
    second.set(first.tensors())
    with torch.no_grad():
        for p, q in zip(fit.trained.values(), other.trained.values(), strict=True):
            q.copy_(p)
            other.optimizer.state[q] = copy.deepcopy(fit.optimizer.state[p])
    other.ctx.step = fit.ctx.step
    second.method.load_state_dict(state)
    assert equal(second.method.state_dict(), state)
    for each in (fit, other):
        each.step(last, 0.5)
        each.step(before[0], 0.7)
        each.method.end_block(each.ctx)
    assert equal(second.tensors(), first.tensors())
    assert equal(second.method.state_dict(), first.method.state_dict())


@every_learner
def test_the_state_between_blocks_is_all_that_the_next_block_needs(name: str, folder: Path, tmp_path: Path) -> None:
    whole = Learner(folder, make(name), dropout=0.1)
    for block in (1, 2):
        whole.fit(block).run()
    write_tensors(tmp_path / "state.safetensors", whole.method.state_dict())
    continued = Learner(folder, make(name), dropout=0.1)
    continued.set(whole.tensors())
    continued.method.load_state_dict(read_tensors(tmp_path / "state.safetensors"))
    for learner in (whole, continued):
        learner.fit(3).run()
    assert equal(continued.tensors(), whole.tensors())
    assert equal(continued.method.state_dict(), whole.method.state_dict())


@every_learner
def test_resuming_inside_a_block_equals_no_interruption(name: str, folder: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"accumulation": 2, "keep": "best", "epochs": 3, "batch_tokens": 32}
    whole = Learner(folder, make(name), dropout=0.1)
    fit = whole.fit(2, **changes)
    per_epoch = len(fit.steps(0))
    assert per_epoch > 2
    result = fit.run(lambda s: save_checkpoint(tmp_path / str(s.position.total_steps), 2, "hash", s), 1)
    for step in (1, per_epoch, per_epoch + 2, 2 * per_epoch, result.steps):
        snapshot = load_checkpoint(tmp_path / str(step), 2, "hash", pytest.fail)
        resumed = Learner(folder, make(name), dropout=0.1)
        again = resumed.fit(2, **changes).run(resume=snapshot)
        assert (again.epoch, again.score, again.steps) == (result.epoch, result.score, result.steps), step
        assert equal(resumed.tensors(), whole.tensors()), step
        assert equal(resumed.method.state_dict(), whole.method.state_dict()), step


@every_learner
def test_a_method_composes_with_fine_tuning_on_both_sides(name: str, folder: Path) -> None:
    alone = learned(folder, make(name))
    for names in (("finetune", name), (name, "finetune")):
        method = Compose([(n, make(name) if n == name else Finetune()) for n in names])
        assert equal(learned(folder, method), alone)


@every_flattened
def test_a_method_composes_with_item_wise_sam(name: str, folder: Path) -> None:
    alone = "finetune" if name.startswith("eisam,") else name.removesuffix("+eisam")
    assert not equal(learned(folder, make(alone)), learned(folder, flattened(name)))


@every_flattened
def test_item_wise_sam_resumed_inside_a_block_equals_no_interruption(name: str, folder: Path) -> None:
    whole, resumed = (Learner(folder, flattened(name), dropout=0.1) for _ in range(2))
    kept: list[Any] = []
    whole.fit(2, accumulation=2, batch_tokens=32).run(kept.append, 1)
    # within the second epoch, where the change that is used again is two steps old
    resumed.fit(2, accumulation=2, batch_tokens=32).run(resume=kept[len(kept) // 2])
    assert equal(resumed.tensors(), whole.tensors())


@every_flattened
def test_item_wise_sam_in_bf16_has_the_gradient_of_float32(name: str, folder: Path) -> None:
    norms = []
    for precision in ("fp32", "bf16"):
        sink = MemorySink()
        fit = Learner(folder, flattened(name)).fit(2, sink, precision=precision)
        fit.begin()
        fit.step(fit.steps(0)[0], 1.0)
        norms.append(next(event["grad_norm"] for event in sink.events if event["kind"] == "step"))
    assert norms[1] == pytest.approx(norms[0], rel=0.05)
    assert norms[1] != norms[0]


class Cube(torch.autograd.Function):
    """x^3 with a gradient that is right or wrong."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.factor = factor
        return x**3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor * ctx.saved_tensors[0] ** 2, None


class Cubic(Method):
    """A method with a term, for the check of terms itself."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def loss_terms(self, ctx: Context, batch: Any, out: Tensor) -> dict[str, Tensor]:
        return {"cubic": out * sum(Cube.apply(p, self.factor).sum() for p in ctx.parameters.values())}


def check_terms(method: Method, folder: Path, outputs_at: Any) -> bool:
    """Whether the gradients of the terms, in float64, are the numerical ones; true where there is no term."""
    learner = Learner(folder, method)
    fit = learner.fit(2)
    (batch, *_), *_ = fit.steps(0)
    first = next(iter(fit.ctx.parameters)).split(".lora_")[0]
    few = {n: p.detach().double() for n, p in fit.ctx.parameters.items() if n.startswith(f"{first}.")}
    parameters = {n: torch.nn.Parameter(t.clone()) for n, t in few.items()}
    anchor = replace(
        fit.ctx,
        parameters=parameters,
        initial=few,
        weights={first: fit.ctx.weights[first].double()},
        set_history=lambda *_: None,
        factors=lambda: {n: t for n, t in few.items() if t.dim() == 2},
        mean_gradient=lambda weights, share: {n: torch.randn_like(w) for n, w in weights.items()},
    )
    method.begin_block(anchor)

    def term(out: Tensor, *values: Tensor) -> Tensor:
        named: Any = dict(zip(few, values, strict=True))
        ctx = Context(named, block=2, step=1, **outputs_at(named))
        terms = method.loss_terms(ctx, batch, out)
        # a constant where there is no term, so that there is something to differentiate
        return sum(terms.values(), 0.0 * (out + sum(v.sum() for v in values)))

    moved = [(t + 0.1 * torch.rand_like(t)).requires_grad_() for t in few.values()]
    out = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    return torch.autograd.gradcheck(term, (out, *moved), raise_exception=False)


@every_learner
def test_the_gradients_of_loss_terms_are_right(name: str, folder: Path, outputs_at: Any) -> None:
    assert check_terms(make(name), folder, outputs_at)


def test_the_check_of_terms_sees_a_wrong_gradient(folder: Path, outputs_at: Any) -> None:
    assert check_terms(Cubic(3.0), folder, outputs_at)
    assert not check_terms(Cubic(3.1), folder, outputs_at)


def subprocess_of(code: str, *arguments: Path | str, launcher: tuple[str, ...] = (), roots: bool) -> str:
    """Run Python code in a process of its own, with or without cladapt's source roots; its standard output."""
    found = [str(Path(module.__file__ or "").parents[1]) for module in (cladapt, cladapt_kernels)] if roots else []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(found), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, code, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


TWO = """
import importlib.util, sys
from pathlib import Path
from cladapt import ranks

spec = importlib.util.spec_from_file_location("conformance", sys.argv[1])
conformance = importlib.util.module_from_spec(spec)
spec.loader.exec_module(conformance)
conformance.as_one_of_two(Path(sys.argv[2]), Path(sys.argv[3]))
ranks.leave(0)
"""
IN_TWO = [*LEARNING, *(name for name in FLATTENED if "+" in name or name.endswith(("tail", "reused", "half")))]
SPLIT: dict[str, Any] = {"lr": 5e-4, "epochs": 2, "accumulation": 2, "batch_tokens": 64}


def as_one_of_two(folder: Path, out: Path) -> None:
    """What each of the two processes does: learn with every method, and leave the result of its rank."""
    for name in IN_TWO:
        learner = Learner(folder, flattened(name) if name in FLATTENED else make(name))
        rank = int(os.environ["RANK"])
        fit = learner.fit(2, JsonlSink(out / name / f"log_{rank}.jsonl"), **SPLIT)
        assert fit.accelerator.num_processes == 2
        fit.run(lambda s, name=name: save_checkpoint(out / name / "checkpoints", 2, "hash", s), 1)  # type: ignore[misc]
        write_tensors(out / name / f"adapter_{rank}.safetensors", learner.tensors())


@pytest.fixture(scope="module")
def two_processes(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("two")
    (out / "script.py").write_text(TWO)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    subprocess_of(str(out / "script.py"), __file__, folder, out, launcher=launcher, roots=True)
    return out


@pytest.mark.parametrize("name", IN_TWO)
def test_two_processes_equal_one(name: str, two_processes: Path, folder: Path) -> None:
    alone, sink = Learner(folder, flattened(name) if name in FLATTENED else make(name)), MemorySink()
    start = alone.tensors()
    fit = alone.fit(2, sink, **SPLIT)
    assert any(len(batch[0]) % 2 for step in fit.steps(0) for batch in step)  # an uneven split is among them
    fit.run()
    first, second = (load_file(two_processes / name / f"adapter_{rank}.safetensors") for rank in range(2))
    assert equal(first, second)
    for tensor_name, tensor in alone.tensors().items():
        torch.testing.assert_close(first[tensor_name], tensor, rtol=0, atol=1e-5)
        if tensor_name in fit.trained:  # far more than the tolerance was learned
            assert (tensor - start[tensor_name]).abs().max() > 1e-4
    written = (two_processes / name / "log_0.jsonl").read_text().splitlines()
    assert len(written) == len(sink.events)
    assert not (two_processes / name / "log_1.jsonl").exists()
    assert len(list((two_processes / name / "checkpoints").iterdir())) == 2


ALONE = """
import sys
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageClassification

base, out, *names = sys.argv[1:]
kind = AutoModelForCausalLM if base.endswith("recommend") else AutoModelForImageClassification
probe = load_file(f"{out}/probe.safetensors")["probe"]
logits = {}
for name in names:
    plain = kind.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        logits[f"base of {name}"] = plain(probe).logits
        logits[name] = PeftModel.from_pretrained(plain, f"{out}/{name}").eval()(probe).logits
save_file(logits, f"{out}/logits.safetensors")
print("cladapt modules:", sum(module.startswith("cladapt") for module in sys.modules))
"""


@pytest.fixture(scope="module")
def stock_logits(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Logits of each method's adapter: as trained here, and in a process that knows PEFT and transformers alone."""
    out, here, probe = tmp_path_factory.mktemp("stock"), {}, PROBES[folder.name]
    for name in LEARNING:
        learner = Learner(folder, make(name))
        learner.fit(2).run()
        save_adapter(out / name, learner.model, learner.base, {})
        with torch.no_grad():
            here[name] = load_adapter(base_of(folder), out / name)(probe).logits
    write_tensors(out / "probe.safetensors", {"probe": probe})
    (out / "script.py").write_text(ALONE)
    printed = subprocess_of(str(out / "script.py"), folder, out, *LEARNING, roots=False)
    assert printed.strip() == "cladapt modules: 0"
    return here, load_file(out / "logits.safetensors")


@every_learner
def test_the_adapter_works_in_stock_peft(name: str, stock_logits: tuple[dict[str, Tensor], dict[str, Tensor]]) -> None:
    here, there = stock_logits
    torch.testing.assert_close(there[name], here[name], rtol=1e-5, atol=1e-5)
    assert (there[name] - there[f"base of {name}"]).abs().max() > 1e-2
