"""The recipes of examples/recipes train, with the packages that they are for.

``python -m pytest -m integration``; requirements.txt says what they need. A recipe whose package is
not installed is skipped by name.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from support.processes import ROOT, free_port, run_python
from support.steps import named_factors

import kfac_fx

pytestmark = pytest.mark.integration
RECIPES = ROOT / "examples" / "recipes"


def recipe(name: str, *packages: str) -> ModuleType:
    """Return a recipe as a module; skip the test where one of its packages is missing."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    if importlib.util.find_spec("torchvision") is not None:
        # transformers imports it where it is there, and beside a CPU build of torch it needs help.
        from zoo import torchvision_import  # noqa: F401
    spec = importlib.util.spec_from_file_location(name, RECIPES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def check(preconditioner: kfac_fx.Preconditioner, losses: list[float], fall: float) -> None:
    """Factors are there and finite, nothing was skipped, and the loss fell by a share of itself."""
    assert preconditioner.skipped_statistics == preconditioner.skipped_gradients == 0
    factors = named_factors(preconditioner)
    assert factors
    for key, factor in factors.items():
        assert torch.isfinite(factor).all() and factor.any(), key
    assert len(losses) > 4 and torch.isfinite(torch.tensor(losses)).all()
    first, last = losses[: len(losses) // 4], losses[-(len(losses) // 4) :]
    assert sum(last) / len(last) < (1 - fall) * sum(first) / len(first), losses


def covered(preconditioner: kfac_fx.Preconditioner) -> None:
    assert not preconditioner.curvature.fallbacks, preconditioner.curvature


def test_huggingface_trainer(tmp_path: Path) -> None:
    made = recipe("huggingface_trainer", "transformers", "accelerate")
    trainer, preconditioner = made.make(str(tmp_path), steps=40)
    trainer.train()
    losses = made.losses(trainer)
    check(preconditioner, losses, fall=0.1)
    covered(preconditioner)
    # A resume goes on as if nothing had been between: the statistics and their draws are the same.
    again, resumed = made.make(str(tmp_path), steps=40)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-20"))
    assert made.losses(again) == pytest.approx(losses, rel=1e-3)
    for key, factor in named_factors(preconditioner).items():
        torch.testing.assert_close(named_factors(resumed)[key], factor)


def test_lightning(tmp_path: Path) -> None:
    made = recipe("lightning_module", "lightning", "sklearn")
    trainer, module, loader = made.make(str(tmp_path), steps=40)
    trainer.fit(module, loader)
    assert len(module.losses) == 80  # two micro-batches a step
    check(module.preconditioner, module.losses, fall=0.3)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    before = named_factors(module.preconditioner)
    trainer, resumed, loader = made.make(str(tmp_path), steps=41)
    trainer.fit(resumed, loader, ckpt_path=tmp_path / "last.ckpt")
    assert resumed.losses and resumed.losses[0] < module.losses[0]
    after = named_factors(resumed.preconditioner)
    for key, factor in before.items():  # one more step has moved the averages a little
        assert (
            torch.nn.functional.cosine_similarity(after[key].flatten(), factor.flatten(), 0) > 0.9
        ), key


def test_accelerate(tmp_path: Path) -> None:
    made = recipe("accelerate_loop", "accelerate", "sklearn")
    run = made.train(15, save=str(tmp_path))
    check(run.preconditioner, run.losses, fall=0.3)
    longer = made.train(16)
    resumed = made.train(1, resume=str(tmp_path))
    assert resumed.losses == pytest.approx(longer.losses[-len(resumed.losses) :], rel=1e-3)


@pytest.mark.parametrize("shard", [(), ("--shard",)], ids=["ddp", "fsdp2"])
def test_two_processes_train_as_one_does(shard: tuple[str, ...], tmp_path: Path) -> None:
    recipe("ddp_and_fsdp2", "sklearn")
    printed = []
    for processes in (1, 2):
        launcher = ["-m", "torch.distributed.run", f"--master-port={free_port()}"]
        launcher.append(f"--nproc-per-node={processes}")
        script = RECIPES / "ddp_and_fsdp2.py"
        done = run_python(*launcher, script, *shard, folder=tmp_path, timeout=900)
        lines = done.stdout.splitlines()
        (line,) = [line for line in lines if line.startswith("loss:")]
        printed.append([float(word) for word in line.split()[1:]])
    one, two = printed
    assert two[0] == pytest.approx(one[0], abs=2e-3) and two[-1] < 0.7 * two[0]


def test_peft() -> None:
    made = recipe("peft_lora", "peft", "transformers")
    losses, preconditioner = made.train(40)
    check(preconditioner, losses, fall=0.1)
    covered(preconditioner)
    names = {
        name for block in preconditioner.curvature.blocks.values() for name in block.parameters
    }
    assert names and all("lora_" in name for name in names)


def test_torchvision_detection() -> None:
    made = recipe("torchvision_detection", "torchvision")
    losses, preconditioner = made.train(40)
    check(preconditioner, losses, fall=0.2)
    covered(preconditioner)


def test_diffusers() -> None:
    made = recipe("diffusers_unet", "diffusers", "sklearn")
    losses, preconditioner = made.train(40)
    check(preconditioner, losses, fall=0.1)
    covered(preconditioner)


def test_torch_geometric() -> None:
    made = recipe("graph_network", "torch_geometric")
    losses, preconditioner = made.train(40)
    check(preconditioner, losses, fall=0.3)
    covered(preconditioner)


def test_policy_gradient() -> None:
    made = recipe("policy_gradient")
    rewards, preconditioner = made.train(60)
    check(preconditioner, [1 - reward for reward in rewards], fall=0.2)
    covered(preconditioner)
