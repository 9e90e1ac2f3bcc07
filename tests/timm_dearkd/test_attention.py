import contextlib
import copy
from collections import Counter

import pytest
import timm
import torch
import torch.nn.functional as F
from test_rel_pos import eq2_slowly, randomize
from timm.layers import Attention
from torch._dynamo.backends.debugging import aot_eager
from torch.utils._python_dispatch import TorchDispatchMode

from timm_dearkd import rel_pos
from timm_dearkd.attention import ConvAttention
from timm_dearkd.rel_pos import RelPosConfig

FLOAT64 = torch.float64


def eq3_slowly(attn, x):
    """Eq. 3 in float64, a head and a query at a time."""
    attn = copy.deepcopy(attn).double()
    scores = eq2_slowly(attn.rpe.alpha, attn.rpe.delta, attn.rpe.grid_size, attn.rpe.num_prefix_tokens)
    outputs = []
    for tokens in x.double():
        q, k, v = attn.qkv(tokens).chunk(3, dim=-1)
        heads = []
        for h in range(attn.num_heads):
            part = slice(h * attn.head_dim, (h + 1) * attn.head_dim)
            rows = [
                F.softmax((k[:, part] @ q[t, part]) / attn.head_dim ** 0.5 + scores[h, t], dim=0) @ v[:, part]
                for t in range(len(tokens))]
            heads.append(torch.stack(rows))
        outputs.append(attn.proj(torch.cat(heads, dim=-1)))
    return torch.stack(outputs)


@pytest.mark.parametrize('grid_size', [(3, 3), (2, 5), (1, 4)])
@pytest.mark.parametrize('num_prefix_tokens', [0, 1, 3])
@pytest.mark.parametrize('form', ['factorised', 'bias', 'unfused'])
def test_all_forms_are_equation_3(grid_size, num_prefix_tokens, form):
    attn = ConvAttention(24, 4, grid_size=grid_size, num_prefix_tokens=num_prefix_tokens, qkv_bias=True)
    randomize(attn.rpe)
    attn.fused_attn = form != 'unfused'
    attn.train(form == 'factorised')
    x = torch.randn(2, num_prefix_tokens + grid_size[0] * grid_size[1], 24)
    with torch.no_grad():
        expected = eq3_slowly(attn, x)
        torch.testing.assert_close(attn(x).double(), expected, atol=2e-6, rtol=0)
        assert (attn.rpe._scores_cache is not None) == (form != 'factorised')


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('dtype,multiple', [(torch.float32, 4), (torch.bfloat16, 8), (torch.float16, 8)])
@pytest.mark.parametrize('head_dim', [5, 6, 12, 16])
@torch.no_grad()
def test_kernels_get_a_width_that_all_of_them_take(head_dim, dtype, multiple, training, accelerator, monkeypatch):
    """Zero channels fill it up, so that the output stays Eq. 3, with channels that are made in training or kept."""
    attn = ConvAttention(2 * head_dim, 2, grid_size=(3, 3), qkv_bias=True).train(training)
    randomize(attn.rpe)
    x = torch.randn(2, 10, 2 * head_dim)
    expected, widths = eq3_slowly(attn, x), []
    kernel = F.scaled_dot_product_attention
    monkeypatch.setattr(F, 'scaled_dot_product_attention', lambda q, k, v, **kwargs: (
        widths.extend(t.shape[-1] for t in (q, k, v)), kernel(q, k, v, **kwargs))[1])
    output = attn.to(dtype)(x.to(dtype))
    assert len(widths) == 3 and all(width % multiple == 0 for width in widths)
    assert min(widths) >= head_dim + multiple and max(widths) < head_dim + 2 * multiple
    atol = {torch.float32: 2e-6, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
    torch.testing.assert_close(output.double(), expected, atol=atol, rtol=0)


@pytest.mark.parametrize('grid_size', [(4, 4), (20, 20)])
def test_norms_that_autocast_leaves_in_float32(grid_size):
    """On an accelerator autocast's layer_norm gives float32; the positions have to be split for the values' dtype."""
    class Norm(torch.nn.LayerNorm):
        def forward(self, x):
            return super().forward(x.float())

    attn = ConvAttention(32, 4, grid_size=grid_size, qk_norm=True, norm_layer=Norm)
    randomize(attn.rpe)
    x = torch.randn(1, grid_size[0] * grid_size[1] + 1, 32)
    expected = attn(x)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        out = attn(x)
    assert (out - expected).norm() < 0.01 * expected.norm()


def test_functional_gradients():
    attn = ConvAttention(24, 4, grid_size=(3, 3))
    x = torch.randn(2, 10, 24)
    parameters = dict(attn.named_parameters())
    grads = torch.func.grad(lambda p: torch.func.functional_call(attn, p, x).square().mean())(parameters)
    attn(x).square().mean().backward()
    for name, parameter in parameters.items():
        torch.testing.assert_close(grads[name], parameter.grad)


def test_training_makes_no_score_matrix():
    """The largest tensor of the forward and of the backward is far below one (heads, T, T)."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(t, torch.Tensor):
                    self.numel = max(self.numel, t.numel())
            return out

    x = torch.randn(1, 401, 24)
    sizes = {}
    for drop_mode in ('query', 'element'):
        attn = ConvAttention(24, 4, grid_size=(20, 20), rel_pos=RelPosConfig(0.1, drop_mode))
        with Largest() as largest:
            attn(x).sum().backward()
        sizes[drop_mode] = largest.numel
    assert sizes['query'] < 0.1 * 4 * 401 * 401
    assert sizes['element'] >= 4 * 401 * 401


@pytest.mark.parametrize('drop_mode', ['element', 'query'])
def test_rpe_dropout(drop_mode):
    attn = ConvAttention(24, 4, grid_size=(4, 4), rel_pos=RelPosConfig(0.5, drop_mode))
    scores = attn.rpe()
    full = attn.rpe.offset_scores(attn.rpe.alpha, attn.rpe.delta)
    kept = scores != 0
    torch.testing.assert_close(scores[kept], 2 * full[kept])
    share = kept.sum() / (full != 0).sum()
    assert 0.25 < share < 0.75
    if drop_mode == 'query':
        rows = kept[:, 1:, 1:].any(-1)
        assert (kept[:, 1:, 1:].sum(-1)[rows] == (full[:, 1:, 1:] != 0).sum(-1)[rows]).all()

    # the same mask in the factorised and in the plain form gives the same attention
    x = torch.randn(2, 17, 24)
    outputs = []
    for fused in (True, False):
        attn.fused_attn = fused
        torch.manual_seed(1)
        outputs.append(attn(x))
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)
    attn.eval()
    torch.testing.assert_close(attn.rpe(), full)


@pytest.mark.parametrize('fused', [True, False])
@pytest.mark.parametrize('training', [True, False])
def test_masks(fused, training):
    """Boolean, additive and causal masks do what they do in timm's attention, on top of the positional scores."""
    attn = ConvAttention(24, 4, grid_size=(3, 3), num_prefix_tokens=1).train(training)
    attn.fused_attn = fused
    x = torch.randn(2, 10, 24)
    causal = torch.ones(10, 10, dtype=torch.bool).tril()
    additive = torch.zeros(10, 10).masked_fill(~causal, float('-inf'))
    with torch.no_grad():
        outputs = [attn(x, attn_mask=causal), attn(x, attn_mask=additive), attn(x, is_causal=True)]
        for out in outputs:
            torch.testing.assert_close(out, outputs[0])
        changed = x.clone()
        changed[:, 5:] += 1
        torch.testing.assert_close(attn(changed, is_causal=True)[:, :5], outputs[0][:, :5])
        assert not torch.allclose(attn(x), outputs[0])


@pytest.mark.parametrize('fused', [True, False])
def test_a_mask_of_all_near_patches_leaves_the_order_of_the_far_ones(fused):
    """In inference as in training, where no score is limited; also from a frozen copy."""
    attn = ConvAttention(24, 4, grid_size=(12, 12), num_prefix_tokens=0)
    attn.fused_attn = fused
    x, mask = torch.randn(1, 144, 24), torch.zeros(144, 144, dtype=torch.bool)
    mask[:, -12:] = True  # the last row
    reference = copy.deepcopy(attn).train()
    attn.eval()
    with torch.no_grad():
        for alpha in (1., 0.5):
            for module in (attn, reference):
                module.rpe.alpha.data.fill_(alpha)  # which no version counts
            expected = reference(x, attn_mask=mask)
            torch.testing.assert_close(attn(x, attn_mask=mask), expected, atol=1e-4, rtol=1e-4)
        attn.freeze_scores()
        torch.testing.assert_close(attn(x, attn_mask=mask), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('kernel_size', [3, 4])
def test_expresses_any_convolution(kernel_size):
    """Cordonnier et al. 2020, theorem 1: K^2 heads at the integer offsets are a K x K convolution."""
    heads, in_chs, out_chs, size = kernel_size ** 2, 5, 7, 9
    head_dim = out_chs
    kernel = torch.randn(out_chs, in_chs, kernel_size, kernel_size)
    low = -1
    attn = ConvAttention(in_chs, heads, attn_head_dim=head_dim, dim_out=out_chs, grid_size=(size, size),
                         num_prefix_tokens=0)
    with torch.no_grad():
        attn.qkv.weight.zero_()
        attn.proj.weight.zero_()
        attn.proj.bias.zero_()
        attn.rpe.alpha.fill_(50.)
        for h in range(heads):
            row, col = h // kernel_size, h % kernel_size
            attn.rpe.delta[h] = torch.tensor([row + low, col + low])
            values = slice((2 * heads + h) * head_dim, (2 * heads + h + 1) * head_dim)
            attn.qkv.weight[values] = kernel[:, :, row, col]
            attn.proj.weight[:, h * head_dim:(h + 1) * head_dim] = torch.eye(out_chs)
    image = torch.randn(2, in_chs, size, size)
    expected = F.conv2d(image, kernel)  # position (0, 0) is the window at rows 0 to K - 1: the query at (-low, -low)
    tokens = image.flatten(2).transpose(1, 2)
    for training in (True, False):
        with torch.no_grad():
            out = attn.train(training)(tokens).transpose(1, 2).reshape(2, out_chs, size, size)
        inner = out[:, :, -low:-low + expected.shape[2], -low:-low + expected.shape[3]]
        torch.testing.assert_close(inner, expected, atol=1e-5, rtol=0)


def test_cache_follows_every_change():
    attn = ConvAttention(24, 4, grid_size=(3, 3)).eval()
    x = torch.randn(2, 10, 24)

    def expect():
        with torch.no_grad():
            out = attn(x.to(attn.qkv.weight.dtype)).double()
            torch.testing.assert_close(out, eq3_slowly(attn, x), atol=1e-5, rtol=0)

    expect()
    with torch.no_grad():
        attn.rpe.alpha.mul_(0.5)
    expect()
    attn.rpe.delta.data += 1.  # moves no version counter
    expect()
    attn.load_state_dict({k: v + 0.1 for k, v in attn.state_dict().items()})
    expect()
    attn.rpe.set_grid_size(9, 1)
    expect()
    attn.double()
    expect()
    first = attn.rpe._scores_cache[0]
    expect()
    assert attn.rpe._scores_cache[0] is first
    assert set(attn.state_dict()) == {'qkv.weight', 'proj.weight', 'proj.bias', 'rpe.alpha', 'rpe.delta'}


def test_scores_cached_in_inference_mode_serve_a_backward():
    attn = ConvAttention(24, 4, grid_size=(3, 3)).eval()
    x = torch.randn(2, 10, 24)
    with torch.inference_mode():
        expected = attn(x)
    attn.rpe.requires_grad_(False)
    x.requires_grad_()
    out = attn(x)
    out.sum().backward()
    torch.testing.assert_close(out, expected.clone())
    assert x.grad.abs().sum() > 0


def test_a_grid_of_compiled_inference_serves_training():
    model = timm.create_model('test_dearkd', dynamic_img_size=True).eval()
    with torch.inference_mode():
        torch.compile(model, backend='eager')(torch.randn(1, 3, 96, 96))
    model.train()(torch.randn(1, 3, 96, 96)).sum().backward()
    assert model.blocks[0].attn.rpe.alpha.grad.abs().sum() > 0


def test_attention_scores_are_those_of_the_forward():
    attn = ConvAttention(24, 4, grid_size=(2, 3), qkv_bias=True)
    x = torch.randn(2, 7, 24)
    content, position, total = attn.attention_scores(x)
    torch.testing.assert_close(position.double(), eq2_slowly(attn.rpe.alpha, attn.rpe.delta, (2, 3), 1))
    torch.testing.assert_close(total, content + position)
    v = attn.qkv(x).chunk(3, dim=-1)[2].reshape(2, 7, 4, 6).transpose(1, 2)
    out = attn.proj((total.softmax(-1) @ v).transpose(1, 2).reshape(2, 7, 24))
    torch.testing.assert_close(attn(x), out, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize('kwargs', [dict(qk_norm=True), dict(scale_norm=True), dict(gated=True), dict(proj_bias=False)])
def test_without_positions_it_is_timm_attention(kwargs):
    """alpha = 0 gives timm's own attention, with all its options."""
    plain = Attention(24, 4, qkv_bias=True, norm_layer=torch.nn.LayerNorm, **kwargs)
    attn = ConvAttention.from_attention(plain, (3, 3))
    with torch.no_grad():
        attn.rpe.alpha.zero_()
    x = torch.randn(2, 10, 24)
    torch.testing.assert_close(attn(x), plain(x), atol=1e-6, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(attn.eval()(x), plain.eval()(x), atol=1e-6, rtol=1e-5)


def test_half_precision_module_keeps_its_grid_exact():
    attn = ConvAttention(24, 4, grid_size=(24, 24)).bfloat16()
    assert attn.rpe.alpha.dtype == torch.bfloat16
    assert attn.rpe.key_basis.dtype == torch.float32
    pos = torch.arange(24) - 11.5
    expected = (pos[:, None] ** 2 + pos ** 2).flatten()
    assert attn.rpe.key_basis[1:, 2].equal(expected)


def test_errors():
    with pytest.raises(ValueError, match='element, query'):
        RelPosConfig(drop_mode='row')
    with pytest.raises(ValueError, match=r'\[0, 1\)'):
        RelPosConfig(drop_rate=1.)
    with pytest.raises(AssertionError, match='set_input_size'):
        ConvAttention(24, 4, grid_size=(3, 3))(torch.randn(1, 9, 24))


@pytest.fixture
def accelerator(monkeypatch):
    """MHCA takes the CPU for an accelerator, on which no cached bias is faster."""
    monkeypatch.setattr(ConvAttention, '_is_cpu_inference', lambda self: False)


# no kernel on a device
VIEWS = {'as_strided', 'expand', 'narrow', 'permute', 'reshape', 'select', 'slice', 'transpose', 'unbind', 'unsqueeze',
         'view', '_reshape_alias', '_unsafe_view', 'clone', 'empty', 'empty_like', 'to', 'alias', 'flatten',
         'unflatten'}


def operations(function):
    """Names of the operations that a function runs, in order."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    return [event.name for event in profile.events() if event.name.startswith('aten::')]


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_inference_on_an_accelerator_makes_the_channels_once(dtype, accelerator):
    """From the second call on, it appends them, and computes nothing else that plain attention does not."""
    mhca = ConvAttention(64, 4, grid_size=(5, 5), qkv_bias=True).to(dtype).eval()
    plain = Attention(64, 4, qkv_bias=True).to(dtype).eval()
    x = torch.randn(2, 26, 64, dtype=dtype)
    first = operations(lambda: mhca(x))
    again, of_plain = operations(lambda: mhca(x)), operations(lambda: plain(x))
    for names in (first, again, of_plain):
        assert 'aten::scaled_dot_product_attention' in names
    new = Counter(again) - Counter(of_plain)
    kernels = {name: count for name, count in new.items() if name.removeprefix('aten::') not in VIEWS}
    assert kernels == {'aten::cat': 1, 'aten::copy_': 1}  # append the channels, and cut them off the output
    assert len(first) > len(again) + 20


class CatDimensions(TorchDispatchMode):
    """Collects the dimensions of what is concatenated."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.cat.default:
            self.found += [x.ndim for x in args[0]]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize('train', [True, False])
@pytest.mark.parametrize('compiled', [True, False])
def test_values_without_channels_give_the_same(train, compiled, accelerator, monkeypatch):
    """As float32 on CUDA has them. Nothing that is concatenated has more than four dimensions."""
    def backend(graph, inputs):
        nodes = [node for node in graph.graph.nodes if node.target is torch.cat]
        cats.found += [x.meta['example_value'].ndim for node in nodes for x in node.args[0]]
        return aot_eager(graph, inputs)

    torch.manual_seed(0)
    mhca = ConvAttention(24, 4, grid_size=(3, 4), qkv_bias=True).train(train)
    x, cats = torch.randn(2, 13, 24), CatDimensions()
    results = []
    for one_width in (True, False):
        monkeypatch.setattr(rel_pos, 'needs_one_width', lambda qkv, value=one_width: value)
        torch.compiler.reset()
        mhca.train(train)  # drops the channels
        function = torch.compile(mhca, backend=backend) if compiled else mhca
        mhca.zero_grad()
        cats.found.clear()
        # the compiler leaves a call under such a mode alone
        with torch.set_grad_enabled(train), contextlib.nullcontext() if compiled else cats:
            out = function(x)
            if train:
                out.square().sum().backward()
        assert cats.found and max(cats.found) <= 4
        results.append([out.detach(), *(p.grad.clone() for p in mhca.parameters() if train)])
    for first, second in zip(*results):
        torch.testing.assert_close(second, first)


CHANGES = {
    'optimizer': lambda rpe: rpe_step(rpe, torch.optim.SGD),
    'fused optimizer': lambda rpe: rpe_step(rpe, torch.optim.AdamW, fused=True),
    'in place': lambda rpe: rpe.alpha.mul_(3.),
    'state dict': lambda rpe: rpe.load_state_dict({'alpha': rpe.alpha * 2, 'delta': rpe.delta + 1}),
    'assigned': lambda rpe: rpe.load_state_dict({'alpha': rpe.alpha * 2, 'delta': rpe.delta + 1}, assign=True),
    'data': lambda rpe: setattr(rpe.delta, 'data', rpe.delta + 1),
    'average': lambda rpe: torch._foreach_lerp_([rpe.alpha.detach()], [torch.full_like(rpe.alpha, 9.)], 0.5),
    'double': lambda rpe: rpe.double(),
    'grid': lambda rpe: rpe.set_grid_size(1, 25),
    'a write that nothing tells, and eval': lambda rpe: (rpe.alpha.data.mul_(3.), rpe.eval()),
}


def rpe_step(rpe, optimizer_class, **kwargs):
    for p in rpe.parameters():
        p.grad = torch.ones_like(p)
    optimizer_class(rpe.parameters(), lr=0.5, **kwargs).step()


@pytest.mark.parametrize('change', CHANGES.values(), ids=CHANGES)
@torch.no_grad()
def test_inference_on_an_accelerator_notices_changes(change, accelerator):
    mhca = ConvAttention(64, 4, grid_size=(5, 5), qkv_bias=True).eval()
    x = torch.randn(2, 26, 64)
    before = mhca(x)
    assert mhca.rpe._channels_cache is not None
    change(mhca.rpe)
    if mhca.rpe.alpha.dtype == torch.float64:
        mhca, x = mhca.double(), x.double()
    after = mhca(x)
    fresh = copy.deepcopy(mhca)
    assert fresh.rpe._channels_cache is None
    assert after.equal(fresh(x)) and (after.dtype == torch.float64 or not torch.allclose(after, before))


@pytest.mark.parametrize('fused', [False, True])
def test_inference_between_the_steps_of_a_loop_that_stays_in_eval(fused, accelerator):
    """A fused step changes no version, and no gradient is left of it."""
    mhca = ConvAttention(64, 4, grid_size=(5, 5), qkv_bias=True).eval()
    optimizer = torch.optim.AdamW(mhca.rpe.parameters(), lr=0.5, fused=fused)
    x = torch.randn(2, 26, 64)
    for _ in range(2):
        with torch.no_grad():
            before = mhca(x)
        mhca(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            after = mhca(x)
            assert after.equal(copy.deepcopy(mhca)(x)) and not torch.allclose(after, before)


@torch.no_grad()
def test_nothing_is_kept_where_a_change_could_not_be_told(accelerator):
    """With a gradient, which an optimizer may apply at any time, or with parametrised values."""
    mhca = ConvAttention(64, 4, grid_size=(5, 5), qkv_bias=True).eval()
    x = torch.randn(2, 26, 64)
    mhca.rpe.alpha.grad = torch.ones(4)
    mhca(x)
    assert mhca.rpe._channels_cache is None
    mhca.rpe.alpha.grad = None
    torch.nn.utils.parametrize.register_parametrization(mhca.rpe, 'alpha', torch.nn.Softplus())
    mhca(x)
    assert mhca.rpe._channels_cache is None
