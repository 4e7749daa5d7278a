"""Networks as users have them, in plain torch, small: name -> (factory, shape of one input)."""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 7), nn.Tanh(), nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 3))


def strided_cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 5, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(5, 6, 3, stride=2, padding=2, dilation=2),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(6 * 2 * 2, 4),
    )


def pooled_cnn() -> nn.Module:
    """Average pooling, no biases."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, bias=False),
        nn.AvgPool2d(2),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, bias=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 3, bias=False),
    )


class Block(nn.Module):
    """Two convolutions round which the input goes, by a projection where sizes change."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.shortcut = nn.Sequential()
        if stride != 1 or before != after:
            self.shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += self.shortcut(x)
        return F.relu(y)


class ResNet20(nn.Module):
    """For CIFAR (He et al. 2016): three stages of three blocks."""

    def __init__(self, width: int = 16, blocks: int = 3, channels: int = 3, classes: int = 10) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        stages, before = [], width
        for i, after in enumerate((width, 2 * width, 4 * width)):
            parts = []
            for j in range(blocks):
                parts.append(Block(before, after, 2 if i and not j else 1))
                before = after
            stages.append(nn.Sequential(*parts))
        self.layer1, self.layer2, self.layer3 = stages
        self.linear = nn.Linear(before, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(F.avg_pool2d(x, x.size(3)).view(x.size(0), -1))


class PaddedShortcut(nn.Module):
    """Every second position, and channels of zeros: the shortcut without parameters."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        half = self.channels // 2
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, half, self.channels - half))


def padded_resnet() -> nn.Module:
    net = ResNet20(4, 1)
    for stage in (net.layer2, net.layer3):
        stage[0].shortcut = PaddedShortcut(stage[0].conv1.in_channels)
    return net


class Inverted(nn.Module):
    """MobileNet's block: expand, filter each channel by itself, project, add."""

    def __init__(self, width: int, expanded: int) -> None:
        super().__init__()
        self.expand, self.bn1 = nn.Conv2d(width, expanded, 1, bias=False), nn.BatchNorm2d(expanded)
        self.depthwise = nn.Conv2d(expanded, expanded, 3, padding=1, groups=expanded, bias=False)
        self.bn2 = nn.BatchNorm2d(expanded)
        self.project, self.bn3 = nn.Conv2d(expanded, width, 1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self.bn1(self.expand(x)))
        y = F.relu6(self.bn2(self.depthwise(y)))
        return x + self.bn3(self.project(y))


def mobilenet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2, padding=1),
        nn.BatchNorm2d(6),
        nn.Hardswish(),
        Inverted(6, 10),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(6, 5),
    )


class DenseBlock(nn.Module):
    """DenseNet's: each layer reads everything before it, concatenated."""

    def __init__(self, channels: int, growth: int, layers: int) -> None:
        super().__init__()
        before = [channels + i * growth for i in range(layers)]
        self.norms = nn.ModuleList(nn.BatchNorm2d(n) for n in before)
        self.convs = nn.ModuleList(nn.Conv2d(n, growth, 3, padding=1, bias=False) for n in before)

    def forward(self, x: Tensor) -> Tensor:
        for norm, conv in zip(self.norms, self.convs, strict=True):
            x = torch.cat([x, conv(F.relu(norm(x)))], dim=1)
        return x


def densenet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 5, 3, padding=1, bias=False),
        DenseBlock(5, 3, 3),
        nn.BatchNorm2d(14),
        nn.ReLU(),
        nn.Conv2d(14, 6, 1, bias=False),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(6 * 4 * 4, 4),
    )


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, w = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, w // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, w))


class ViT(nn.Module):
    """Patches, a class token, positions, pre-norm blocks."""

    def __init__(self, width: int = 12, heads: int = 3, blocks: int = 2) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 4, 4)
        self.token, self.positions = nn.Parameter(torch.zeros(1, 1, width)), nn.Parameter(torch.randn(1, 5, width))
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm1": nn.LayerNorm(width),
                    "attention": Attention(width, heads),
                    "norm2": nn.LayerNorm(width),
                    "up": nn.Linear(width, 2 * width),
                    "down": nn.Linear(2 * width, width),
                }
            )
            for _ in range(blocks)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.positions
        for block in self.blocks:
            x = x + block["attention"](block["norm1"](x))
            x = x + block["down"](F.gelu(block["up"](block["norm2"](x))))
        return self.head(self.norm(x)[:, 0])


class TorchTransformer(nn.Module):
    """torch's own encoder layer, on whole numbers, whose embedding is the last layer's weights as well."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embedding(x)).mean(1))


class Normalised1d(nn.Module):
    """A 1d CNN with layer norms, over channels and over channels and places."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv1d(2, 6, 5, padding=2), nn.LayerNorm(6)
        self.conv2, self.norm2 = nn.Conv1d(6, 8, 3, stride=2), nn.LayerNorm([8, 7])
        self.conv3, self.norm3 = nn.Conv1d(8, 8, 3, padding=1, groups=2), nn.GroupNorm(2, 8)
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.norm1(self.conv1(x).transpose(1, 2)).transpose(1, 2))
        x = F.silu(self.norm2(self.conv2(x)))
        x = F.silu(self.norm3(self.conv3(x)))
        return self.fc(x.mean(-1))


NETWORKS = {
    "mlp": (mlp, (3, 4)),
    "strided_cnn": (strided_cnn, (2, 7, 7)),
    "pooled_cnn": (pooled_cnn, (1, 8, 8)),
    "resnet20": (ResNet20, (3, 8, 8)),
    "padded_resnet": (padded_resnet, (3, 8, 8)),
    "mobilenet": (mobilenet, (3, 8, 8)),
    "densenet": (densenet, (1, 8, 8)),
    "vit": (ViT, (1, 8, 8)),
    "cnn_1d": (Normalised1d, (2, 16)),
}


class ResNet18(nn.Module):
    """torchvision's ResNet-18, with its names."""

    class Basic(nn.Module):
        def __init__(self, before: int, after: int, stride: int) -> None:
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after)
            self.relu = nn.ReLU(inplace=True)
            self.conv2, self.bn2 = nn.Conv2d(after, after, 3, 1, 1, bias=False), nn.BatchNorm2d(after)
            self.downsample = None
            if stride != 1:
                self.downsample = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

        def forward(self, x: Tensor) -> Tensor:
            y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
            y += x if self.downsample is None else self.downsample(x)
            return self.relu(y)

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        self.maxpool, widths = nn.MaxPool2d(3, 2, 1), (64, 64, 128, 256, 512)
        for i, (before, after) in enumerate(itertools.pairwise(widths)):
            blocks = (self.Basic(before, after, 2 if i else 1), self.Basic(after, after, 1))
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(512, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        for i in range(4):
            x = self.get_submodule(f"layer{i + 1}")(x)
        return self.fc(torch.flatten(self.avgpool(x), 1))
