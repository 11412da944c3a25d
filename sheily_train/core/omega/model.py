"""CortezaCognitivaV4: the network of OMEGA 21, from 1,600 numbers to an anomaly, 16 dendrites and 64 of coherence.

    layer 1   the client: it reads or generates the vectors
    layer 2   an LSTM and a Transformer over the 25 subspaces, fused by a gate; 1,600 out
    layer 3   a residual MLP; 512 out
    layer 4   self-attention over the 512, as 8 groups of 64, and a residual MLP; 512 out
    layer 5   heads: anomaly (1), dendrites (16, −1..1), coherence (64, −1..1); and a decoder, used in training only

What runs once a subspace (25 times a vector) is narrow; the parameters are in what runs once a vector.
Shapes: N vectors, S = 25 subspaces, W = 64 numbers in each, V = S·W = 1600, H = 512.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from sheily_train.colab.batches import COHERENCE, DENDRITES, VECTOR
from sheily_train.core.omega.surprise import POOLED, STATISTICS, SUBSPACES, WIDTH, Reading, Surprise
from sheily_train.core.omega.wide import WideLinear

HIDDEN = 512
_WIDE = 2048
_NARROW = 1024
_READ = VECTOR + SUBSPACES * STATISTICS


@dataclass(frozen=True)
class Cortex:
    """What the network makes of N vectors.

    Attributes:
        anomaly_N: logits.
        dendrites_ND: 16 numbers in −1..1.
        coherence_NC: 64 numbers in −1..1.
        layer4_NH: what the heads read.
        rebuilt_NSW: the decoder's standardised vectors.
        activations: mean absolute activation of layers 2, 3 and 4.
    """

    anomaly_N: Tensor
    dendrites_ND: Tensor
    coherence_NC: Tensor
    layer4_NH: Tensor
    rebuilt_NSW: Tensor
    activations: Tensor


class CortezaCognitivaV4(nn.Module):
    """The five layers, 12 million parameters; ``surprise`` holds the running moments of what it has read."""

    def __init__(self) -> None:
        super().__init__()
        self.surprise = Surprise()
        self.layer2 = Layer2()
        self.layer3 = Layer3()
        self.layer4 = Layer4()
        self.anomaly = AnomalyHead()
        self.dendrites = nn.Linear(HIDDEN, DENDRITES)
        self.coherence = nn.Linear(HIDDEN, COHERENCE)
        self.decoder = WideLinear(HIDDEN, VECTOR)
        for head, size in ((self.dendrites, 0.02), (self.coherence, 0.002), (self.decoder, 0.002)):
            nn.init.normal_(head.weight, std=size)
            nn.init.zeros_(head.bias)

    def forward(self, reading: Reading, visible_NS: Tensor | None = None) -> Cortex:
        """Judge what ``surprise`` read; layers 2 to 4 see only the subspaces marked in ``visible_NS`` (1 or 0).

        The anomaly head reads every subspace's statistics all the same.
        """
        x_NSW, z_NSF = reading.x_NSW, reading.statistics_NSF
        seen_NS1 = torch.ones_like(x_NSW[..., :1]) if visible_NS is None else visible_NS[..., None]
        layer2_NSW = self.layer2(x_NSW * seen_NS1)
        # A sum divided by the root of the count: noise keeps its size however many subspaces are seen.
        pooled_NW = (layer2_NSW * seen_NS1).sum(1) / seen_NS1.sum(1).sqrt()
        layer3_NH = self.layer3(layer2_NSW.flatten(1), (z_NSF * seen_NS1).flatten(1), pooled_NW)
        layer4_NH = self.layer4(layer3_NH)
        return Cortex(
            anomaly_N=self.anomaly(layer4_NH, reading.surprise_NP),
            dendrites_ND=torch.tanh(self.dendrites(layer4_NH)),
            coherence_NC=torch.tanh(self.coherence(layer4_NH)),
            layer4_NH=layer4_NH,
            rebuilt_NSW=self.decoder(layer4_NH).view_as(x_NSW),
            activations=torch.stack([part.detach().abs().mean() for part in (layer2_NSW, layer3_NH, layer4_NH)]),
        )


class Layer2(nn.Module):
    """LSTM and Transformer over the subspaces, side by side, fused by a gate: [N, S, W] to [N, S, W]."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(WIDTH, WIDTH, batch_first=True)
        self.place = nn.Parameter(0.02 * torch.randn(SUBSPACES, WIDTH))
        self.attention = Attention()
        self.mlp = Residual(WIDTH, 2 * WIDTH)
        self.gate = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x_NSW: Tensor) -> Tensor:
        """The subspaces, each having read the others."""
        recurrent_NSW, _ = self.lstm(x_NSW)
        attended_NSW = self.mlp(self.attention(x_NSW + self.place))
        gate_NSW = torch.sigmoid(self.gate(torch.cat([recurrent_NSW, attended_NSW], -1)))
        output: Tensor = x_NSW + gate_NSW * recurrent_NSW + (1 - gate_NSW) * (attended_NSW - x_NSW)
        return output


class Layer3(nn.Module):
    """A residual MLP over layer 2 and the statistics, beside a straight path for the subspaces' mean: [N, H]."""

    def __init__(self) -> None:
        super().__init__()
        self.read = WideLinear(_READ, _WIDE)
        self.mlp = Residual(_WIDE, _NARROW)
        self.write = WideLinear(_WIDE, HIDDEN)
        self.mean = nn.Linear(WIDTH, HIDDEN)

    def forward(self, layer2_NV: Tensor, statistics_NX: Tensor, pooled_NW: Tensor) -> Tensor:
        """512 numbers a vector."""
        wide = self.mlp(self.read(torch.cat([layer2_NV, statistics_NX], 1)))
        output: Tensor = self.write(functional.gelu(wide)) + self.mean(pooled_NW)
        return output


class Layer4(nn.Module):
    """Self-attention over 8 groups of 64, then a residual MLP: [N, H] to [N, H], normalised."""

    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Parameter(0.02 * torch.randn(HIDDEN // WIDTH, WIDTH))
        self.attention = Attention()
        self.mlp = Residual(HIDDEN, _WIDE)
        self.norm = nn.LayerNorm(HIDDEN)

    def forward(self, layer3_NH: Tensor) -> Tensor:
        """What the heads read."""
        groups_NGW = layer3_NH.view(len(layer3_NH), -1, WIDTH)
        output: Tensor = self.norm(self.mlp(self.attention(groups_NGW + self.place).flatten(1)))
        return output


class AnomalyHead(nn.Module):
    """A logit from the surprise and from layer 4. Before any label it already grows with the surprise."""

    def __init__(self) -> None:
        super().__init__()
        self.surprise = nn.Linear(2 * POOLED, 1)
        self.layer4 = nn.Linear(HIDDEN, 1, bias=False)
        with torch.no_grad():
            self.surprise.weight.zero_()[:, POOLED:] = 4 / POOLED
            self.surprise.bias.fill_(-2.0)
            self.layer4.weight.zero_()

    def forward(self, layer4_NH: Tensor, surprise_NP: Tensor) -> Tensor:
        """Logits [N]. A standard normal number is 0.8 from its mean on average."""
        both = torch.cat([surprise_NP, surprise_NP.abs() - 0.8], 1)
        output: Tensor = (self.surprise(both) + self.layer4(layer4_NH))[:, 0]
        return output


class Attention(nn.Module):
    """Four heads of self-attention over a few tokens of 64, normalised before, added after: [N, T, W].

    Written out: over 25 tokens the products themselves are faster than a fused kernel, and the same bits every time.
    """

    heads = 4

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x_NTW: Tensor) -> Tensor:
        """The tokens, each having attended to all."""
        count, tokens, _ = x_NTW.shape
        qkv = self.qkv(self.norm(x_NTW)).view(count, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind()
        weights_NATT = torch.softmax(query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5, -1)
        output: Tensor = x_NTW + self.out((weights_NATT @ value).transpose(1, 2).reshape(count, tokens, -1))
        return output


class Residual(nn.Module):
    """x + MLP(norm(x)), with GELU between."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        linear = WideLinear if width >= HIDDEN else nn.Linear
        self.up = linear(width, hidden)
        self.down = linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape as ``x``."""
        output: Tensor = x + self.down(functional.gelu(self.up(self.norm(x))))
        return output
