"""Pictures of measured steps: who did what when in the pipeline, and what the chunk manager moved where."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from memory.timeline import draw_timeline
from parallel import ParallelConfig
from parallel.schedule_picture import Recorder, bubble_share, draw_schedule


class StepPictures:
    """--parallel.draw-schedule draws one step; --memory.draw two, as an update hides behind the next forward.
    All ranks enter both methods. cfg: of pretrain.py or sft.py."""

    def __init__(
        self,
        cfg,
        layout: ParallelConfig,
        mesh: DeviceMesh,
        optimizer: Optimizer,
        device: torch.device,
        first_step: int,
    ):
        self.run_dir, self.layout, self.mesh, self.device = Path(cfg.run_dir), layout, mesh, device
        self.manager = optimizer.manager if cfg.memory.draw else None
        # the first steps are not typical, and placement auto plans after three
        last = self.last = cfg.train.steps - 1
        self.schedule_step = min(first_step + 2, last) if layout.draw_schedule else None
        self.memory_step = max(first_step, min(first_step + 6, last - 1)) if cfg.memory.draw else None
        self.recorder = None

    def before(self, step: int) -> Recorder | None:
        """What the step of this number, from 0, notes its pipeline in."""
        self.recorder = Recorder(self.mesh["pp"], self.device) if step == self.schedule_step else None
        if step == self.memory_step:
            self.manager.record = True
        return self.recorder

    def after(self, steps_done: int, say: Callable[[str], None] | None) -> None:
        """say: on the rank that draws."""
        events = self.recorder.gather() if self.recorder else None
        if say and events:
            draw_schedule(events, self.run_dir / "schedule.png", self.layout.schedule)
            say(
                f"step {steps_done}: drawn in {self.run_dir}/schedule.png; {bubble_share(events):.0%} of it is bubbles"
            )
        if self.manager and self.manager.record and steps_done > min(self.memory_step + 1, self.last):
            self.manager.record = False
            if say:
                draw_timeline(
                    self.manager.events,
                    self.run_dir / "memory.png",
                    f"steps {self.memory_step + 1} to {steps_done}",
                )
                say(f"step {steps_done}: drawn in {self.run_dir}/memory.png")
