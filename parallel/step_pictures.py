"""Pictures of measured steps: who did what when in the pipeline, and what the chunk manager moved where."""

from pathlib import Path

from dtensor_llama.terminal import Say
from parallel.assemble import Training
from parallel.schedule_picture import Recorder, bubble_share, draw_schedule


class StepPictures:
    """Draws one step with draw_schedule=True, and two with the chunk manager's draw=True, since an update
    hides behind the forward of the next step. All ranks enter both methods.

    first_step, steps: where the run begins, and how many steps it has in all.
    draws_memory: whether memory is drawn, which needs a chunk manager.
    """

    def __init__(self, training: Training, run_dir: Path, first_step: int, steps: int, draws_memory: bool):
        self.training, self.run_dir = training, run_dir
        self.manager = training.optimizer.manager if draws_memory else None
        # The first steps are not typical: things are set up, and placement auto plans after three.
        self.last = steps - 1
        draws_schedule = training.layout.config.draw_schedule
        self.schedule_step = min(first_step + 2, self.last) if draws_schedule else None
        self.memory_step = max(first_step, min(first_step + 6, self.last - 1)) if draws_memory else None
        self.recorder: Recorder | None = None

    def before(self, step: int) -> None:
        """Call it before the step of this number, counted from 0."""
        self.recorder = None
        if step == self.schedule_step:
            self.recorder = Recorder(self.training.layout.mesh["pp"], self.training.device)
        if self.training.pipeline:
            self.training.pipeline.recorder = self.recorder
        if step == self.memory_step:
            self.manager.record = True

    def after(self, steps_done: int, say: Say | None) -> None:
        """Call it after the step. say: on the rank that draws, None on the others."""
        events = self.recorder.gather() if self.recorder else None
        if say and events:
            path = self.run_dir / "schedule.png"
            draw_schedule(events, path, self.training.layout.config.schedule)
            say(f"step {steps_done}: drawn in {path}; {bubble_share(events):.0%} of it is bubbles")
        if self.manager and self.manager.record and steps_done > min(self.memory_step + 1, self.last):
            self.manager.record = False
            if say:
                path = self.run_dir / "memory.png"
                self.manager.draw(path, f"steps {self.memory_step + 1} to {steps_done}")
                say(f"step {steps_done}: drawn in {path}")
