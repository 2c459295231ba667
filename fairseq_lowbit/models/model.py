"""HuBERT: front-end, encoder, the masked-prediction head and the CTC head."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fairseq_lowbit.models.architecture import Architecture, parse_conv_layers
from fairseq_lowbit.models.encoder import Encoder, EncoderLayer
from fairseq_lowbit.models.extractor import FeatureExtractor, output_lengths, padding_mask
from fairseq_lowbit.models.protocols import Frames
from fairseq_lowbit.nn import Conv1d, Linear, attach
from fairseq_lowbit.nn.operators import Operator
from fairseq_lowbit.nn.work import HasWork, Steps, modules_with_work
from fairseq_lowbit.precision import Plan, Precision, Role


class Hubert(nn.Module):
    """HuBERT of any shape and precision.

    Args:
        shape: see :class:`Architecture`.
        classes: labels of the masked-prediction head; 0 leaves the label embeddings out.
        precision: which operators are quantized; None for a float model.
        units: outputs of the CTC head ``ctc_proj``, the blank first; 0 leaves the head out. Names
            of precisions leave it float, as they do ``final_proj``; rules reach both.

    ``plan`` is the resolved precision. State-dict keys are those of fairseq's HubertModel; the
    quantizers add keys below the operator they belong to.

    Raises:
        LowbitError: an impossible shape or precision.
    """

    def __init__(
        self,
        shape: Architecture,
        classes: int = 0,
        precision: Precision | None = None,
        units: int = 0,
    ) -> None:
        super().__init__()
        shape.check()
        self.shape = shape
        self.conv_layers = parse_conv_layers(shape.conv_feature_layers)
        channels, dim = self.conv_layers[-1][0], shape.encoder_embed_dim
        final_dim = shape.final_dim or dim
        self.feature_extractor = FeatureExtractor(
            self.conv_layers, shape.extractor_mode, shape.conv_bias, shape.padding != "valid"
        )
        self.layer_norm = nn.LayerNorm(channels)
        self.post_extract_proj = None
        if channels != dim or shape.project_features:
            self.post_extract_proj = Linear(channels, dim, role=Role.PROJECTION)
        self.dropout_input = nn.Dropout(shape.dropout_input)
        self.mask_emb = nn.Parameter(torch.empty(dim).uniform_())
        self.encoder = Encoder(shape)
        self.final_proj = Linear(dim, final_dim, role=Role.HEAD)
        self.ctc_proj = Linear(dim, units, role=Role.HEAD) if units else None
        self.plan: Plan = attach(self, precision or Precision())
        # Behind the plan, which tells what is stored of the model that is used: labels are for
        # pre-training only.
        if classes:
            # fairseq draws them from U(0, 1), where all point the same way: slow to tell apart.
            self.label_embs_concat = nn.Parameter(torch.randn(classes, final_dim))

    @property
    def layers(self) -> Sequence[EncoderLayer]:
        return self.encoder.layers

    @property
    def features(self) -> int:
        return self.shape.encoder_embed_dim

    @property
    def samples_per_frame(self) -> int:
        return math.prod(stride for _, _, stride in self.conv_layers)

    def untrained(self, precision: Precision | None = None) -> "Hubert":
        """A model of this shape with random weights, without label embeddings."""
        units = 0 if self.ctc_proj is None else self.ctc_proj.out_features
        return Hubert(self.shape, precision=precision, units=units)

    def frame_lengths(self, samples: Tensor) -> Tensor:
        """Valid frames of utterances of ``samples`` valid samples, integers of any shape."""
        return output_lengths(samples, self.conv_layers)

    def operator_steps(self, samples: int) -> dict[str, list[Steps]]:
        """Every operator's and attention's call on one utterance; all but the heads, which no
        hidden state needs."""
        steps, length, convolutions = {}, samples, iter(self.conv_layers)
        for name, module in modules_with_work(self):
            read = length
            if isinstance(module, Conv1d):
                length = int(output_lengths(torch.tensor(read), [next(convolutions)]))
            if module is not self.final_proj and module is not self.ctc_proj:
                steps[name] = self._calls(module, Steps(read, length))
        return steps

    def _calls(self, module: HasWork, steps: Steps) -> list[Steps]:
        """What an operator does while the encoder, or a convolution, makes ``steps``."""
        role = module.role if isinstance(module, Operator) else None
        if role is Role.GATE:  # reads the values of each head apart
            heads = self.shape.encoder_attention_heads
            return [Steps(heads * steps.read, heads * steps.written)]
        if role is Role.EMBEDDING:  # each layer looks up every distance
            distances = 2 * steps.read - 1
            return [Steps(distances, distances)] * len(self.layers)
        return [steps]

    def extract(self, waveform: Tensor, lengths: Tensor | None = None) -> Frames:
        """Front-end only.

        Args:
            waveform: [batch, samples] at 16 kHz.
            lengths: [batch] valid samples; None when there is no padding.

        Returns:
            features [batch, frames, channels].
        """
        features = self.feature_extractor(waveform, lengths)
        if lengths is None:
            return Frames(features, None)
        frames = features.shape[1]
        valid = self.frame_lengths(lengths)
        if self.shape.padding == "fairseq_hubert":
            # It shares the samples out among the frames, and counts a frame that has a valid one.
            valid = -(-lengths // (waveform.shape[1] // frames))
        return Frames(features, padding_mask(valid, frames))

    def project(self, frames: Frames, mask: Tensor | None = None) -> Frames:
        """Features to encoder inputs [batch, frames, dim]; ``mask`` [batch, frames] is True where
        the mask embedding replaces them."""
        x = self.layer_norm(frames.x)
        if self.post_extract_proj is not None:
            x = self.post_extract_proj(x)
        x = self.dropout_input(x)
        if mask is not None:
            x = torch.where(mask[..., None], self.mask_emb.to(x.dtype), x)
        return Frames(x, frames.padding_mask)

    def begin(self, frames: Frames, mask: Tensor | None = None) -> Tensor:
        """Features to the input of the first layer, [batch, frames, dim]; ``mask`` as in
        :meth:`project`."""
        frames = self.project(frames, mask)
        return self.encoder.begin(frames.x, frames.padding_mask)

    def encode(self, frames: Frames, mask: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """Features to the encoder's output and the output of every layer that ran, each
        [batch, frames, dim]."""
        frames = self.project(frames, mask)
        return self.encoder(frames.x, frames.padding_mask)

    def hidden_states(
        self, waveform: Tensor, lengths: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor | None]:
        """Outputs of layers 1..L and the frame padding mask (None without padding)."""
        frames = self.extract(waveform, lengths)
        _, outputs = self.encode(frames, mask)
        return outputs, frames.padding_mask

    def representations(
        self, waveform: Tensor, lengths: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor | None]:
        """What Hugging Face and s3prl call the hidden states: the input of layer 1, then the output
        of every layer, that of the last behind the final layer norm of a pre-norm model; L + 1 of
        [batch, frames, dim], and the frame padding mask (None without padding)."""
        frames = self.extract(waveform, lengths)
        x = self.begin(frames)
        states = [x]
        for layer in self.layers:
            x = layer(x, frames.padding_mask).x
            states.append(x)
        return [*states[:-1], self.encoder.end(x)], frames.padding_mask

    def final_output(self, waveform: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Output of ``final_proj``, [batch, frames, final_dim]. Reaches every operator, so this is
        what calibration runs."""
        return self.project_final(self.hidden_states(waveform, lengths)[0][-1])

    def project_final(self, x: Tensor) -> Tensor:
        """Output of the last layer to that of ``final_proj``, [batch, frames, final_dim]."""
        x = self.encoder.end(x)
        if self.ctc_proj is not None:
            self.ctc_proj(x)  # for its quantizers, where it has some: calibration looks at them
        return self.final_proj(x)

    def label_logits(self, x: Tensor) -> Tensor:
        """Cosine similarity to the label embeddings over the temperature: [..., dim] encoder
        outputs -> [..., classes], fp32."""
        return cosine_logits(self.final_proj(x), self.label_embs_concat, self.shape.logit_temp)

    def unit_log_probabilities(
        self, waveform: Tensor, lengths: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """What the CTC head makes of utterances: log-probabilities [batch, frames, units], fp32,
        and the frame padding mask (None without padding); arguments as in :meth:`hidden_states`."""
        frames = self.extract(waveform, lengths)
        return self.classify_units(self.encode(frames, mask)[0]), frames.padding_mask

    def classify_units(self, x: Tensor) -> Tensor:
        """Log-probabilities of the units: [..., dim] encoder outputs -> [..., units], fp32."""
        return F.log_softmax(self.ctc_proj(x).float(), dim=-1)


class WithoutWeights(TorchFunctionMode):
    """Models made in this context have shapes and a plan, but no weights: on the meta device, and
    without drawing numbers, which there would take seconds."""

    _DRAWING = (Tensor.normal_, Tensor.uniform_, nn.init.normal_, nn.init.kaiming_normal_)

    def __enter__(self):
        self._device = torch.device("meta")
        self._device.__enter__()
        return super().__enter__()

    def __exit__(self, *exception: object) -> None:
        super().__exit__(*exception)
        self._device.__exit__(*exception)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in self._DRAWING:
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


def cosine_logits(projected: Tensor, label_embeddings: Tensor, temperature: float) -> Tensor:
    """[..., final_dim] and [classes, final_dim] -> [..., classes], fp32 (HuBERT's eq. 3)."""
    x = F.normalize(projected.float(), dim=-1)
    return x @ F.normalize(label_embeddings.float(), dim=-1).T / temperature
