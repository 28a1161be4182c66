import torch

from benchmarks.network import draw_inputs, fill_both
from benchmarks.plain_dit import PlainDiT
from pipeline.dit import DiT, DiTConfig


def test_a_plain_writing_of_the_paper_gives_our_output_and_gradients():
    config = DiTConfig(input_size=(4, 8), hidden_size=32, depth=2, num_heads=4, num_classes=5)
    ours, plain = DiT(config), PlainDiT(config)
    fill_both(ours, plain)
    inputs = draw_inputs(config, 3)
    outputs = [model(*inputs) for model in (ours, plain)]
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-6)
    for output in outputs:
        output.square().sum().backward()
    torch.testing.assert_close(ours.blocks[0].attn.qkv.weight.grad, plain.blocks[0].attention.qkv.weight.grad)
