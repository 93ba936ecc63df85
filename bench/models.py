"""Parameter lists of real models, as shapes in the order of `model.parameters()`, computed from their architectures.

A benchmark of an optimizer needs the shapes and nothing else: no download, no torchvision, no transformers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

Shape = tuple[int, ...]


def numel(shapes: Sequence[Shape]) -> int:
    """The number of parameters of a list of shapes."""
    return sum(math.prod(shape) for shape in shapes)


def single(n: int) -> list[Shape]:
    """One tensor of n elements."""
    return [(n,)]


def many(count: int, n: int) -> list[Shape]:
    """`count` tensors of n elements each."""
    return [(n,)] * count


def _linear(inputs: int, outputs: int) -> list[Shape]:
    return [(outputs, inputs), (outputs,)]


def _norm(width: int) -> list[Shape]:
    return [(width,), (width,)]


def _convolution(inputs: int, outputs: int, kernel: int) -> list[Shape]:
    """A convolution without bias and the batch normalisation behind it."""
    return [(outputs, inputs, kernel, kernel), *_norm(outputs)]


def resnet20() -> list[Shape]:
    """ResNet-20 for CIFAR-10 (He et al., 2016, section 4.2), with parameter-free shortcuts (option A)."""
    shapes = _convolution(3, 16, 3)
    width = 16
    for outputs in (16, 32, 64):
        for _ in range(3):
            shapes += _convolution(width, outputs, 3) + _convolution(outputs, outputs, 3)
            width = outputs
    return shapes + _linear(width, 10)


def resnet50() -> list[Shape]:
    """ResNet-50 for ImageNet (He et al., 2016), in the order of torchvision."""
    shapes = _convolution(3, 64, 7)
    width = 64
    for inner, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += _convolution(width, inner, 1) + _convolution(inner, inner, 3) + _convolution(inner, 4 * inner, 1)
            if block == 0:
                shapes += _convolution(width, 4 * inner, 1)
            width = 4 * inner
    return shapes + _linear(width, 1000)


def vit_b16() -> list[Shape]:
    """ViT-B/16 for 224 x 224 pixels and 1000 classes (Dosovitskiy et al., 2021), in the order of torchvision."""
    width, inner, patch, pixels = 768, 3072, 16, 224
    tokens = 1 + (pixels // patch) ** 2
    shapes: list[Shape] = [(1, 1, width), (width, 3, patch, patch), (width,), (1, tokens, width)]
    for _ in range(12):
        attention = _linear(width, 3 * width) + _linear(width, width)
        shapes += _norm(width) + attention + _norm(width) + _linear(width, inner) + _linear(inner, width)
    return shapes + _norm(width) + _linear(width, 1000)


def gpt2() -> list[Shape]:
    """GPT-2 with 124M parameters (Radford et al., 2019), output tied to the embedding; weights stored transposed."""
    width, inner = 768, 3072
    shapes: list[Shape] = [(50257, width), (1024, width)]
    for _ in range(12):
        shapes += [*_norm(width), (width, 3 * width), (3 * width,), (width, width), (width,)]
        shapes += [*_norm(width), (width, inner), (inner,), (inner, width), (width,)]
    return shapes + _norm(width)


def llama_1b() -> list[Shape]:
    """Llama 3.2 1B: 16 layers of width 2048, 8 key-value heads of 64, output tied to the embedding."""
    width, inner, keys = 2048, 8192, 512
    shapes: list[Shape] = [(128256, width)]
    for _ in range(16):
        shapes += [(width, width), (keys, width), (keys, width), (width, width)]
        shapes += [(inner, width), (inner, width), (width, inner), (width,), (width,)]
    return [*shapes, (width,)]


def autoencoder(encoder: Sequence[int]) -> list[Shape]:
    """A deep autoencoder whose decoder mirrors its encoder.

    Args:
        encoder: Widths from the input to the code layer.
    """
    widths = [*encoder, *reversed(encoder[:-1])]
    return [shape for pair in itertools.pairwise(widths) for shape in _linear(*pair)]


def curves() -> list[Shape]:
    """The CURVES autoencoder (Hinton and Salakhutdinov, 2006; spec kfac, section 11)."""
    return autoencoder((784, 400, 200, 100, 50, 25, 6))


def mnist() -> list[Shape]:
    """The MNIST autoencoder (Hinton and Salakhutdinov, 2006; spec kfac, section 11)."""
    return autoencoder((784, 1000, 500, 250, 30))


def faces() -> list[Shape]:
    """The FACES autoencoder (Hinton and Salakhutdinov, 2006; spec kfac, section 11)."""
    return autoencoder((625, 2000, 1000, 500, 30))


def transformer() -> list[Shape]:
    """The linear layers of 12 transformer layers of width 1024 (as those of BERT-large and GPT-2 medium)."""
    width, inner = 1024, 4096
    return [shape for _ in range(12) for shape in [(width, width)] * 4 + [(inner, width), (width, inner)]]


def kronecker_factors(shapes: Sequence[Shape]) -> list[Shape]:
    """The factors of K-FAC for a parameter list: of the inputs of each weight, and of its outputs.

    Linear layers (weights of two dimensions) have a bias, and so one more input.

    Args:
        shapes: The parameter list.
    """
    sizes = [(math.prod(s[1:]) + (len(s) == 2), s[0]) for s in shapes if len(s) > 1]
    return [(n, n) for pair in sizes for n in pair]


def shampoo_factors(shapes: Sequence[Shape]) -> list[Shape]:
    """The factors of Shampoo for a parameter list: of the rows and the columns of each weight, flattened to a matrix.

    Args:
        shapes: The parameter list.
    """
    return [(n, n) for s in shapes if len(s) > 1 for n in (s[0], math.prod(s[1:]))]


MODELS: dict[str, Callable[[], list[Shape]]] = {
    "resnet20": resnet20,
    "resnet50": resnet50,
    "vit_b16": vit_b16,
    "gpt2": gpt2,
    "llama_1b": llama_1b,
    "curves": curves,
    "mnist": mnist,
    "faces": faces,
}
