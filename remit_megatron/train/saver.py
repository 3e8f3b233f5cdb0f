"""Checkpoints of a run: when one is complete, the files beside it are safe and the reference has shown its weights."""

from dataclasses import asdict

from remit_megatron.mcore import dist_checkpoint
from remit_megatron.run.checkpoint import CheckpointFolder, Meta
from remit_megatron.run.folder import RunFolder
from remit_megatron.run.process import Process, from_rank_0
from remit_megatron.run.reference import Reference
from remit_megatron.run.watchdog import Watchdog
from remit_megatron.train.hooks import Moment
from remit_megatron.train.outputs import Outputs
from remit_megatron.train.step import Progress
from remit_megatron.train.student import Student


class Saver:
    """Writes and reads the run's checkpoints. Methods are collective."""

    def __init__(
        self,
        folder: RunFolder,
        checkpoints: CheckpointFolder,
        student: Student,
        reference: Reference | None,
        outputs: Outputs,
        progress: Progress,
        process: Process,
        watchdog: Watchdog,
        *,
        asynchronous: bool,
    ):
        self.folder = folder
        self.checkpoints = checkpoints
        self.student = student
        self.reference = reference
        self.outputs = outputs
        self.progress = progress
        self.process = process
        self.watchdog = watchdog
        self._background = dist_checkpoint.BackgroundSave() if asynchronous else None

    def poll(self, moment: Moment) -> None:
        """As a hook after each step: complete the checkpoint that a background process has written."""
        if self._background:
            self._background.poll()

    def after(self, moment: Moment) -> None:
        """As a hook: a checkpoint of this step, complete on return where no step follows."""
        self.save(wait=moment.is_last or moment.is_stop)

    def save(self, *, wait: bool) -> None:
        """wait: until it is complete, where it is written in the background.

        Raises RunError where it cannot be written, or the reference's weights have changed.
        """
        with self.watchdog.slow("a checkpoint"):
            self._save(wait)

    def _save(self, wait: bool) -> None:
        if self.reference:
            self.reference.verify_frozen()
        chunks, optimizer = self.student.complete(), self.student.optimizer
        meta = self.progress.meta
        if self.outputs.identities is not None:
            meta = Meta(**{**asdict(meta), "loggers": self.outputs.identities})
        from_rank_0(self._ready, self.process.device)
        if self._background:
            self._background.wait()
        partial = self.checkpoints.partial(meta.step)
        from_rank_0(lambda: self.checkpoints.begin(meta.step), self.process.device)

        def commit() -> None:
            from_rank_0(lambda: self._commit(meta), self.process.device)
            self.outputs.status.saved(meta.step)

        if self._background:
            self._background.start(partial, chunks, optimizer, commit)
            if wait:
                self._background.wait()
        else:
            dist_checkpoint.save(partial, chunks, optimizer)
            commit()

    def _ready(self) -> None:
        """On rank 0: the folder is still the run's, and the lines that the checkpoint counts on are safe."""
        self.folder.check_in_place()
        self.outputs.sync()

    def _commit(self, meta: Meta) -> None:
        self.folder.check_in_place()
        self.checkpoints.commit(meta, stays=self.folder.recipe.keeps_checkpoint(meta.tokens))
