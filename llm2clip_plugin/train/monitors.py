"""The monitors that DeepSpeed's configuration names: TensorBoard, Weights & Biases, CSV."""

from types import SimpleNamespace
from typing import Any

import numpy


class Monitors:
    """DeepSpeed's monitors, taken from its engine, which would itself write the learning rate, by
    samples since the last start."""

    def __init__(self, device_engine: Any) -> None:
        self._monitor = device_engine.monitor
        device_engine.monitor = SimpleNamespace(enabled=False)
        # DeepSpeed would call W&B for each value
        self._wandb = self._monitor.wandb_monitor
        self._monitor.wandb_monitor = None
        # with their texts, for the next values
        self.pictures: dict[str, tuple[Any, str]] = {}

    def report(self, values: dict[str, float], samples: int) -> None:
        """Send labeled values and ``pictures``, from rank 0; to W&B in one call."""
        if not self._monitor.enabled:
            return
        if self._wandb is not None:
            self._report_to_wandb(values, samples)
        if self._monitor.tb_monitor is not None:
            self._show_in_tensorboard(samples)
        events = [(label, value, samples) for label, value in values.items()]
        self._monitor.write_events(events)
        self.pictures.clear()

    def _report_to_wandb(self, values: dict[str, float], samples: int) -> None:
        import wandb

        images = {
            name: wandb.Image(picture, caption=text)
            for name, (picture, text) in self.pictures.items()
        }
        self._wandb.log({**values, **images}, step=samples)

    def _show_in_tensorboard(self, samples: int) -> None:
        writer = self._monitor.tb_monitor.summary_writer
        for name, (picture, text) in self.pictures.items():
            pixels = numpy.asarray(picture)
            writer.add_image(name, pixels, samples, dataformats="HWC")
            writer.add_text(name, text, samples)
