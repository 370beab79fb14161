"""Plan the cases that people ask about, in words and as pictures: part of docs/planning.md.

python recipes/bench/plan_cases.py                     print them
python recipes/bench/plan_cases.py --pictures docs     draw planning.png and scaling.png into docs
"""

from dataclasses import dataclass
from pathlib import Path

from dtensor_llama import LlamaConfig
from dtensor_llama.cli import FilePath, run_recipe
from memory.auto import foresee
from parallel.cluster import find_cluster
from parallel.config import ParallelConfig
from parallel.cost import Account, Work, account_for
from parallel.planner import Found, Question, draw_plan, name_of, plan
from parallel.recompute import MODES
from parallel.rules import Job

SEQUENCES, T = 1024, 4096  # a step of LLaMA-2 has 4M tokens
CASES = (("llama2-7b", "a100-80gb", 8), ("llama2-7b", "h200-141gb", 8), ("llama2-70b", "a100-40gb", 512))
SIZES = (8, 16, 32, 64, 128, 256, 512)
SCALED = ("llama2-7b", "llama2-13b", "llama2-70b")


def planned(model: str, gpu: str, n_gpus: int) -> Found:
    return plan(Question(LlamaConfig.preset(model), T, SEQUENCES, find_cluster(gpu, n_gpus), foresee=foresee))


def zero3_account(recompute: str) -> Account:
    """Return the account of 70B under ZeRO-3 over 512 A100-40GB, without any other axis."""
    model = LlamaConfig.preset("llama2-70b")
    job = Job(model, T, SEQUENCES, 2, recompute=recompute, compile=True, device_type="cuda")
    return account_for(Work(job, ParallelConfig(dp_shard=512)), find_cluster("a100-40gb", 512))


def cases_in_words() -> str:
    """Return the cases as a part of docs/planning.md."""
    parts = []
    for model, gpu, n_gpus in CASES:
        found = planned(model, gpu, n_gpus)
        parts.append(
            f"{model}, {SEQUENCES} sequences of {T} tokens a step, blocks compiled:\n\n"
            f"```\n{found.describe()}\n```"
        )
    best = found.best.account.mfu
    zero3 = zero3_account("full").mfu / best
    needs = [f"{zero3_account(recompute).peak_gib:.1f} GiB with recompute {recompute}" for recompute in MODES]
    parts.append(
        "70B on 512 x A100-40GB is the case in which ZeRO-3 alone did not start. Its states are not the "
        f"reason, since they are 2 GiB a GPU. Two sequences a GPU need {needs[0]}, {needs[1]} and "
        f"{needs[2]}. Without recomputation the activations alone are several times the GPU. With all of it "
        f"the run fits, at {zero3:.0%} of the speed of the best layout, which has tp and pp."
    )
    parts.append(
        "![7B to 70B from 8 to 512 GPUs](scaling.png)\n\n![the layouts of 70B on 512 GPUs](planning.png)"
    )
    return "\n\n".join(parts)


def scaling(gpu: str) -> dict[str, list[tuple[int, float, str]]]:
    """Return, for each model, (GPUs, MFU, layout) of the best plan, where one fits without offload."""
    found: dict[str, list[tuple[int, float, str]]] = {}
    for model in SCALED:
        for n_gpus in SIZES:
            question = Question(LlamaConfig.preset(model), T, SEQUENCES, find_cluster(gpu, n_gpus))
            try:
                best = plan(question).best
            except ValueError:
                continue
            found.setdefault(model, []).append((n_gpus, best.account.mfu, name_of(best.work)))
    return found


def draw_scaling(path: Path) -> None:
    """Draw the predicted MFU of the best plan of each model against the number of GPUs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, both = pyplot.subplots(1, 2, figsize=(11, 4.5), sharey=True)
    for axes, gpu in zip(both, ("a100-80gb", "h100-80gb"), strict=True):
        for model, points in scaling(gpu).items():
            n_gpus, mfus = [point[0] for point in points], [100 * point[1] for point in points]
            axes.plot(n_gpus, mfus, "-o", label=model)
        axes.set_xscale("log", base=2)
        axes.set_xticks(SIZES, [str(size) for size in SIZES])
        axes.set_xlabel(f"GPUs ({gpu})")
        axes.set_ylim(0, 75)
        axes.legend(frameon=False, loc="lower left")
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    both[0].set_ylabel("MFU of the best plan, % (predicted)")
    figure.suptitle("4M tokens a step, whatever the number of GPUs")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


@dataclass(frozen=True)
class CasesConfig:
    """Plan the cases that people ask about."""

    pictures: FilePath | None = None  # a folder to draw planning.png and scaling.png into


def main(cfg: CasesConfig) -> None:
    if cfg.pictures is None:
        print(cases_in_words())
        return
    draw_plan(planned("llama2-70b", "a100-40gb", 512), Path(cfg.pictures) / "planning.png")
    draw_scaling(Path(cfg.pictures) / "scaling.png")


if __name__ == "__main__":
    run_recipe(main, CasesConfig)
