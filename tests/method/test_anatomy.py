import re

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from torch import nn

from itae_utils.errors import ItaeError
from itae_utils.method.anatomy import adapt, block_index, block_inputs, patch_grid, tokens_entering
from itae_utils.method.attention import attention_map
from itae_utils.method.statistics import qkv_norms, token_norms
from tests import reference
from tests.conftest import STRUCTURES, as_backbone, images, tiny_vit


@pytest.mark.parametrize(("name", "named"), [
    ("vit_base_patch16_siglip_224", r"\[CLS\]"),
    ("swin_tiny_patch4_window7_224", "SwinTransformer"),
    ("beit_base_patch16_224", "Beit"),
    ("eva02_enormous_patch14_clip_224", "block 0 .*EvaBlockPostNorm"),
    ("vit_small_patch16_rope_224", "block 0 .*AttentionRope"),
    ("vit_pe_core_tiny_patch16_384", "block 0 .*AttentionRope"),
    ("vit_base_patch16_rope_reg1_gap_256", r"\[CLS\]"),
    ("resnet18", "ResNet"),
    ("vit_small_patch16_18x2_224", "block 0 .*ParallelThingsBlock"),
])
def test_unsupported_models_are_named(name, named):
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(ItaeError, match=named):
        adapt(model)


class Wrapper(nn.Module):
    def __init__(self, **modules):
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)


@pytest.mark.parametrize(("wrap", "places"), [
    (as_backbone, [".model"]), (nn.DataParallel, [".module"]), (nn.Sequential, ["[0]"]),
    (lambda vit: nn.Sequential(nn.Identity(), nn.DataParallel(vit)), ["[1].module"]),
    (lambda vit: Wrapper(net=vit), [".net"]),
    (lambda vit: Wrapper(head=nn.Linear(2, 2), net=Wrapper(vit=vit)), [".net.vit"]),
    (lambda vit: Wrapper(student=vit, teacher=Wrapper(backbone=tiny_vit())), [".student", ".teacher.backbone"]),
    (lambda vit: nn.ModuleDict({"image": vit}), [".image"]),
    (lambda vit: torch.compile(vit, backend="eager"), ["._orig_mod"]),
    (lambda vit: torch.compile(nn.DataParallel(vit), backend="eager"), ["._orig_mod.module"]),
    (torch.optim.swa_utils.AveragedModel, [".module"])])
def test_a_wrapper_is_refused_and_the_places_of_its_models_are_named(wrap, places):
    model = wrap(tiny_vit())
    with pytest.raises(ItaeError) as error:
        adapt(model)
    assert type(model).__name__ in str(error.value)
    assert str(error.value).endswith(f": pass its {' or '.join(places)}")
    for place in places:
        assert adapt(eval(f"model{place}")).blocks


def test_a_wrapped_model_that_can_t_be_used_says_why():
    model = tiny_vit()
    model.blocks[0].attn.qkv = Wrapper(base_layer=model.blocks[0].attn.qkv)
    with pytest.raises(ItaeError, match=r"block 0 .*Wrapper.*merge_and_unload"):
        adapt(Wrapper(base_model=Wrapper(model=model)))


@pytest.mark.parametrize("model", ["demo", None, tiny_vit, torch.zeros(3), nn.Linear(2, 2)])
def test_what_is_no_model_is_refused(model):
    with pytest.raises(ItaeError, match=type(model).__name__):
        adapt(model)


def test_a_model_of_another_package_is_named_with_it():
    with pytest.raises(ItaeError, match=r"torchvision.*VisionTransformer is not supported"):
        adapt(torchvision.models.VisionTransformer(32, 16, 2, 2, 32, 32))


def test_a_block_or_attention_replaced_by_compiled_code_is_refused():
    for index, part in enumerate(["", ".attn", ".attn.qkv"]):
        model = tiny_vit()
        name = f"blocks.{index}{part}"
        model.set_submodule(name, torch.compile(model.get_submodule(name), backend="eager"))
        with pytest.raises(ItaeError, match=rf"block {index} .*torch\.compile"):
            adapt(model)


def test_unsupported_attention_and_projection_classes_are_named():
    model = tiny_vit()
    model.blocks[1].attn.qkv = nn.Sequential(model.blocks[1].attn.qkv)
    with pytest.raises(ItaeError, match=r"block 1 .*Sequential"):
        adapt(model)
    model.blocks[1].attn = nn.MultiheadAttention(24, 3)
    with pytest.raises(ItaeError, match=r"block 1 .*MultiheadAttention"):
        adapt(model)


def test_block_index():
    model = tiny_vit()
    assert [block_index(model, block) for block in (-3, -1, 0, 2)] == [0, 2, 0, 2]
    assert block_index(model, np.int64(-1)) == 2
    for block in (3, -4, None, 1.0, True, "last", [1], float("nan")):
        with pytest.raises(ItaeError, match=re.escape(f"block {block!r}: ")):
            block_index(model, block)


def test_patch_grid_and_its_errors():
    assert patch_grid(tiny_vit(), images(1, 24, 40)) == (3, 5)
    for height, nearest in [(30, "24 or 32"), (5, "8 or 16"), (0, "8 or 16")]:
        with pytest.raises(ItaeError, match=f"size {height} .*{nearest}"):
            patch_grid(tiny_vit(), torch.zeros(1, 3, height, 32))
    assert patch_grid(tiny_vit(in_chans=1), torch.zeros(1, 1, 8, 8)) == (1, 1)
    assert patch_grid(tiny_vit().half(), images(1).half()) == (4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert patch_grid(tiny_vit(), images(1).bfloat16()) == (4, 4)


PIXELS = images(2)


@pytest.mark.parametrize(("given", "named"), [
    (PIXELS[0], r"\(3, 32, 32\)"), (PIXELS.permute(0, 2, 3, 1), r"\(2, 32, 32, 3\).*channels first"),
    (PIXELS[:, :1], r"\(2, 1, 32, 32\)"), (PIXELS[:, [0, 1, 2, 2]], r"\(2, 4, 32, 32\)"), (PIXELS.byte(), "uint8"),
    (PIXELS.double(), "float64"), (PIXELS.half(), "float16"), (PIXELS.to("meta"), "meta"), (PIXELS.numpy(), "ndarray"),
    (list(PIXELS), "list"), (Image.new("RGB", (32, 32)), "Image"), ({"pixel_values": PIXELS}, "dict"),
    (None, "NoneType"), ("dog.jpg", "str"), ((PIXELS, 0), "tuple")])
@pytest.mark.parametrize("measure", [token_norms, qkv_norms, attention_map])
def test_images_of_another_kind_are_one_line(measure, given, named):
    with pytest.raises(ItaeError, match=named) as error:
        measure(tiny_vit(), given)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_block_inputs_are_the_arguments_that_each_block_gets(structure):
    model, batch = tiny_vit(structure), images(2, 24, 40)
    blocks = range(len(model.blocks))
    inputs = block_inputs(model, batch, blocks)
    x, options = reference.embedded(model, batch)
    for index, block in enumerate(model.blocks):
        assert torch.equal(inputs[index].tokens, x)
        if options[index].get("rope") is not None:
            assert torch.equal(inputs[index].rope, options[index]["rope"])
        x = block(x, **options[index])
    assert torch.equal(inputs[blocks[-1]].run(model.blocks[-1]), x)
    tokens = tokens_entering(model, batch, blocks)
    assert all(torch.equal(tokens[index], inputs[index].tokens) for index in blocks)


def test_the_forward_pass_stops_at_the_last_block_asked_for_and_removes_its_hooks():
    model = tiny_vit()
    model.blocks[1].forward = model.blocks[2].forward = lambda *_: pytest.fail("computed too much")
    assert list(tokens_entering(model, images(1), [0, 1])) == [0, 1]
    some = block_inputs(model, images(1), [0, 1], {1})
    assert [inputs.tokens is None for inputs in some.values()] == [True, False]
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_hooks_are_removed_after_a_failure():
    model = tiny_vit()
    with pytest.raises(RuntimeError):
        tokens_entering(model, torch.zeros(1, 5, 32, 32), [2])
    assert not any(module._forward_pre_hooks for module in model.modules())
