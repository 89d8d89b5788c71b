"""What every audio tower has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from fastclap.errors import ConfigError
from fastclap.features import LogMel
from fastclap.models.freezing import Stages
from fastclap.models.layers import no_grad_if


class AudioTower(nn.Module):
    """What every audio tower has.

    Attributes:
        width: size of the output vector.
        sampling_rate: of the waveform that `forward` takes, in Hz.
        min_samples: shorter clips are extended with zeros to this, so that every layer has at least one frame.
        equal_lengths_only: padding would change the result, so embed clips of equal length together.
        single_on_cpu: on a CPU a clip by itself is faster than in a batch: its products are large enough, and its data
            stay in the cache.
        frozen: nothing trains but what `combine` learns.
        chunk: longer clips are seen in parts of this many samples; None: whole, or cut to the tower's window.
        window: samples that the encoder sees at most; None: all of a clip.
        hf_config: complete transformers configuration, None for a tower of our own.
    """

    width: int
    sampling_rate: int = 16000
    min_samples: int = 1
    equal_lengths_only: bool = False
    single_on_cpu: bool = False
    frozen: bool = False
    chunk: int | None = None
    window: int | None = None
    hf_config: dict[str, Any] | None = None

    def forward(
        self,
        audio: Tensor,  # int16 or float [B, T], padding arbitrary
        lengths: Tensor | None = None,  # [B] valid samples; None: all
        mean: Tensor | None = None,  # [B] whole-file mean, full scale 1 (waveform towers)
        std: Tensor | None = None,  # [B] whole-file standard deviation, full scale 1 (waveform towers)
        host_lengths: Sequence[int] | None = None,  # lengths, for the host: a tower may leave out padding with them
    ) -> Tensor:  # [B, width]
        with no_grad_if(self.frozen):
            summary = self.summarize(audio, lengths, mean, std, host_lengths)
        return self.combine(summary)

    def summarize(
        self,
        audio: Tensor,  # the arguments are those of `forward`
        lengths: Tensor | None = None,
        mean: Tensor | None = None,
        std: Tensor | None = None,
        host_lengths: Sequence[int] | None = None,
    ) -> Tensor:  # [B, ...]
        """What the encoder says of each clip: all of the tower that `freeze` keeps fixed."""
        raise NotImplementedError

    def combine(
        self,
        summary: Tensor,  # [B, ...]
    ) -> Tensor:  # [B, width]
        """The tower's vectors from the summaries; what is learned in here goes on learning in a frozen tower."""
        return summary

    def begin_step(self, number: int, seconds: float) -> None:
        """A training step begins: for what changes with their number.

        Args:
            number: steps that were taken before.
            seconds: of audio in a step of all processes together.
        """

    def go_on_training(self) -> None:
        """Training begins with a tower that was trained before: for what differs then from the first time."""

    def findings(self) -> Tensor | None:  # float32 [n]
        """What the backward passes of this step have found, to be summed over the processes; None: nothing."""
        return None

    def end_step(self, findings: Tensor) -> None:
        """A training step ends with these findings of all processes."""

    def training_state(self) -> dict[str, Tensor]:
        """What training changes and no model holds, for checkpoints: copies."""
        return {}

    def load_training_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from such a state."""

    def prepare_training(self, *, compile: bool = False, checkpoint: bool = False) -> None:
        """Execution options, to be set once before training; they have no effect on results.

        Args:
            compile: compile each transformer layer with `torch.compile`, where the tower can.
            checkpoint: keep each transformer layer's input only and compute the layer again in the backward pass.
                Our own small towers have too little to gain and ignore it.

        Raises:
            ConfigError: `checkpoint` with an architecture that transformers cannot checkpoint.
        """

    def stages(self) -> Stages:
        """The parts that can be frozen."""
        return Stages()


_MOST = {
    "n_fft": 1 << 15,
    "n_mels": 1 << 10,
    "num_frames": 1 << 20,
    "sampling_rate": 1 << 20,
    "mel_sampling_rate": 1 << 20,
}
"""More than any front-end has."""


def features_of(preset: str, changes: dict[str, Any]) -> LogMel:
    """The front-end of a tower: a preset with changes to it.

    Raises:
        ConfigError: an unknown option, or a value that is impossible.
    """
    for name, most in _MOST.items():
        if isinstance(changes.get(name), int) and changes[name] > most:
            raise ConfigError(f"log-mel features: {name} is {changes[name]:,}; give at most {most:,}")
    try:
        return LogMel(preset, **changes)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"log-mel features: {error}") from error


def zeros_that_count(log_mel: LogMel, window: int) -> int:
    """How many of the zeros that fill a window behind a clip its features depend on, in samples.

    With as many, they are those of the whole window, and frames of nothing but zeros are not computed: they are
    silence, and a reflection at the end of so many zeros has zeros in it. A front-end with a padding value of its own
    sees the whole window.
    """
    return log_mel.spec.n_fft if log_mel.spec.padding_value is None else window
