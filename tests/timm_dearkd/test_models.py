"""The models, and timm's contract: whatever a timm ViT does, a DearKD model does."""
import copy
import importlib
import io

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2, param_groups_layer_decay

from distill_hooks.task import keep_constants_local
from timm_dearkd import ConvAttention

NAMES = [
    'dearkd_tiny_patch16_224', 'dearkd_small_patch16_224', 'dearkd_base_patch16_224', 'dearkd_tiny_patch16_384',
    'dearkd_small_patch16_384', 'dearkd_base_patch16_384', 'dearkd_tiny_patch4_32', 'dearkd_nano_patch4_32',
    'test_dearkd', 'dearkd_from']
SMALL = ['dearkd_nano_patch4_32', 'test_dearkd']


def create(name='test_dearkd', **kwargs):
    """A small model whose positional scores differ between heads and blocks."""
    model = timm.create_model(name, **kwargs).eval()
    with torch.no_grad():
        for block in getattr(model, 'model', model).blocks:
            if isinstance(block.attn, ConvAttention):
                block.attn.rpe.alpha.uniform_(0, 1)
                block.attn.rpe.delta.uniform_(-2, 2)
    return model


def images(model, batch_size=2):
    size = timm.models.get_model_input_config(model)['input_size']
    return torch.randn(batch_size, *size)


def test_names_are_registered():
    assert sorted(timm.list_models('*dearkd*')) == sorted(NAMES)
    assert timm.list_pretrained('*dearkd*') == []


@pytest.mark.parametrize('name,like,heads,mhca', [
    ('dearkd_tiny_patch16_224', 'deit_tiny_patch16_224', 12, 8),
    ('dearkd_small_patch16_224', 'deit_small_patch16_224', 12, 8),
    ('dearkd_base_patch16_224', 'deit_base_patch16_224', 16, 8),
    ('dearkd_base_patch16_384', 'deit_base_patch16_384', 16, 8),
])
def test_parameters_are_deit_plus_three_per_head(name, like, heads, mhca):
    with torch.device('meta'):
        model, plain = timm.create_model(name), timm.create_model(like)
    count, expected = (sum(p.numel() for p in m.parameters()) for m in (model, plain))
    assert count == expected + 3 * heads * mhca
    assert all(block.attn.num_heads == heads for block in model.blocks)
    assert [isinstance(block.attn, ConvAttention) for block in model.blocks] == [True] * mhca + [False] * (12 - mhca)
    added = set(dict(model.named_parameters())) - set(dict(plain.named_parameters()))
    assert added == {f'blocks.{i}.attn.rpe.{p}' for i in range(mhca) for p in ('alpha', 'delta')}


@pytest.mark.parametrize('name', SMALL)
def test_no_mhca_blocks_is_the_plain_vit(name):
    model = create(name, num_mhca_blocks=0, num_classes=5)
    args = dict(img_size=32, patch_size=4, embed_dim=96, depth=6, num_heads=12) if 'nano' in name else dict(
        img_size=160, patch_size=16, embed_dim=64, depth=6, num_heads=2, mlp_ratio=3)
    plain = timm.models.VisionTransformer(num_classes=5, **args).eval()
    plain.load_state_dict(model.state_dict())
    x = images(model)
    torch.testing.assert_close(model(x), plain(x))


@pytest.mark.parametrize('name', SMALL)
def test_training_and_inference_forms_agree(name):
    model = create(name)
    x = images(model)
    with torch.no_grad():
        cached = model(x)
    torch.testing.assert_close(model(x), cached, atol=1e-5, rtol=1e-5)


def test_every_parameter_takes_a_gradient():
    model = create(num_classes=42).train()
    out = model(images(model))
    out.square().mean().backward()
    assert out.shape == (2, 42)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model.blocks[0].attn.rpe.alpha.grad.abs().min() > 0


@pytest.mark.parametrize('name', NAMES[:8])
def test_pretrained_cfg(name):
    with torch.device('meta'):
        model = timm.create_model(name)
    cfg, state_dict = model.pretrained_cfg, model.state_dict()
    size = int(name.rsplit('_', 1)[1])
    assert cfg['input_size'] == (3, size, size) and cfg['fixed_input_size'] and cfg['architecture'] == name
    assert f'{cfg["classifier"]}.weight' in state_dict and f'{cfg["first_conv"]}.weight' in state_dict
    assert model.patch_embed.grid_size == model.blocks[0].attn.rpe.grid_size


def test_pretrained_without_weights_says_so():
    with pytest.raises(ValueError, match='No weights of test_dearkd are published'):
        timm.create_model('test_dearkd', pretrained=True)


def test_features_only():
    model = create(features_only=True, out_indices=(1, 3, 5))
    features = model(torch.randn(2, 3, 160, 160))
    assert [f.shape for f in features] == [(2, 64, 10, 10)] * 3
    assert model.feature_info.channels() == [64] * 3 and model.feature_info.reduction() == [16] * 3


@pytest.mark.parametrize('name', SMALL)
def test_forward_intermediates(name):
    model = create(name)
    x = images(model)
    taken = {}
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda m, a, out, i=i: taken.__setitem__(i, out))
    final, maps = model.forward_intermediates(x, indices=[1, 4])
    torch.testing.assert_close(final, model.forward_features(x))
    height, width = model.patch_embed.grid_size
    for i, feature in zip((1, 4), maps):
        torch.testing.assert_close(feature, taken[i][:, 1:].transpose(1, 2).reshape(2, -1, height, width))
    tokens = model.forward_intermediates(x, indices=2, output_fmt='NLC', intermediates_only=True, norm=True)
    torch.testing.assert_close(tokens[-1], model.norm(taken[5])[:, 1:])
    early = model.forward_intermediates(x, [1], stop_early=True, intermediates_only=True, return_prefix_tokens=True)
    torch.testing.assert_close(early[0][1], taken[1][:, :1])
    as_dict = model.forward_intermediates(x, [1], output_dict=True)
    torch.testing.assert_close(as_dict['image_intermediates'][0], maps[0])
    mask = torch.ones(height * width + 1, height * width + 1, dtype=torch.bool)
    torch.testing.assert_close(model.forward_intermediates(x, [4], attn_mask=mask)[1][0], maps[1])
    layers = model.get_intermediate_layers(x, n=[4], reshape=True)
    torch.testing.assert_close(layers[0], maps[1])


def test_prune_intermediate_layers():
    model = create()
    x = images(model)
    expected = model.forward_intermediates(x, [2], intermediates_only=True)
    assert model.prune_intermediate_layers([2], prune_norm=True) == [2]
    assert len(model.blocks) == 3
    torch.testing.assert_close(model.forward_intermediates(x, [2], intermediates_only=True)[0], expected[0])


def test_classifier():
    model = create(num_classes=7)
    x = images(model)
    features = model.forward_features(x)
    pooled = model.forward_head(features, pre_logits=True)
    torch.testing.assert_close(pooled, features[:, 0])
    torch.testing.assert_close(model.get_classifier()(pooled), model(x))
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    model.reset_classifier(0, 'avg')
    torch.testing.assert_close(model(x), model.forward_features(x)[:, 1:].mean(1))
    assert create(num_classes=0, global_pool='')(x).shape == (2, 101, 64)


def test_weight_decay_and_layer_decay():
    model = create()
    rpe = {f'blocks.{i}.attn.rpe.{p}' for i in range(4) for p in ('alpha', 'delta')}
    assert rpe <= model.no_weight_decay() and 'pos_embed' in model.no_weight_decay()
    names = {id(p): n for n, p in model.named_parameters()}
    optimizer = create_optimizer_v2(model, 'adamw', lr=1., weight_decay=0.1)
    decayed = {names[id(p)] for g in optimizer.param_groups if g['weight_decay'] for p in g['params']}
    assert not decayed & rpe and 'blocks.0.attn.qkv.weight' in decayed

    scales = {
        names[id(p)]: g['lr_scale'] for g in param_groups_layer_decay(model, layer_decay=0.5) for p in g['params']}
    assert scales['head.weight'] == 1 and scales['pos_embed'] == 0.5 ** 7
    for i in range(4):
        assert scales[f'blocks.{i}.attn.rpe.delta'] == scales[f'blocks.{i}.attn.qkv.weight'] == 0.5 ** (6 - i)


def test_gradient_checkpointing():
    model = create().train()
    x = images(model)
    model(x).square().mean().backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    model.set_grad_checkpointing()
    model(x).square().mean().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], msg=name)


@pytest.mark.parametrize('name', SMALL)
def test_meta_device(name):
    with torch.device('meta'):
        model = timm.create_model(name)
    assert all(p.is_meta for p in model.parameters())
    model = model.to_empty(device='cpu')
    model.init_weights()
    reference = timm.create_model(name)
    for block, expected in zip(model.blocks[:4], reference.blocks):
        for name in ('alpha', 'delta', 'key_basis', 'query_basis'):
            assert getattr(block.attn.rpe, name).equal(getattr(expected.attn.rpe, name))
    model.load_state_dict(reference.state_dict())
    x = images(model)
    torch.testing.assert_close(model.eval()(x), reference.eval()(x))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize('training', [True, False])
def test_dtypes(dtype, training):
    model = create(dtype=dtype, num_classes=10).train(training)
    assert {p.dtype for p in model.parameters()} == {dtype}
    x = images(model).to(dtype)
    with torch.set_grad_enabled(training):
        out = model(x)
    assert out.dtype == dtype
    reference = copy.deepcopy(model).float()(x.float())
    assert (out.float() - reference).norm() < 0.1 * reference.norm()
    if training:
        out.float().square().mean().backward()
        assert model.blocks[0].attn.rpe.delta.grad.isfinite().all()


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    model = create(num_classes=10).train()
    x = images(model)
    with torch.autocast('cpu', dtype=dtype):
        out = model(x)
    assert out.dtype == dtype
    out.float().square().mean().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    reference = model(x)
    assert (out.float() - reference).norm() < 0.1 * reference.norm()


@pytest.mark.parametrize('in_chans,batch_size', [(1, 1), (5, 3)])
def test_in_chans_and_batch_sizes(in_chans, batch_size):
    model = create(in_chans=in_chans)
    assert model(torch.randn(batch_size, in_chans, 160, 160)).shape == (batch_size, 1000)


@pytest.mark.parametrize('size', [(96, 128), (160, 160), (16, 240)])
def test_dynamic_img_size(size):
    """Any grid gives what a model made for it gives; a size in between changes nothing."""
    model = create()
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        out = model(x)
        fixed = timm.create_model('test_dearkd', img_size=size, dynamic_img_size=False).eval()
        fixed.load_state_dict(timm.models.vision_transformer.checkpoint_filter_fn(model.state_dict(), fixed))
        torch.testing.assert_close(fixed(x), out)
        model(torch.randn(1, 3, 48, 80))
        torch.testing.assert_close(model(x), out)
    torch.testing.assert_close(model(x), out, atol=1e-5, rtol=1e-5)


def test_evaluating_at_a_size_first_leaves_training_at_it_possible():
    model = create()
    x = torch.randn(2, 3, 64, 96)
    with torch.inference_mode():
        model(x)
    model.train()(x).sum().backward()
    assert model.blocks[0].attn.rpe.alpha.grad is not None


def test_set_input_size():
    model = create('dearkd_nano_patch4_32')
    before = [block.attn.rpe.alpha.clone() for block in model.blocks[:4]]
    model.set_input_size(img_size=(24, 40))
    assert all(block.attn.rpe.grid_size == (6, 10) for block in model.blocks[:4])
    assert all(block.attn.rpe.alpha.equal(alpha) for block, alpha in zip(model.blocks, before))
    x = torch.randn(2, 3, 24, 40)
    with torch.no_grad():
        out = model(x)
    assert out.shape == (2, 1000)
    torch.testing.assert_close(model(x), out, atol=1e-5, rtol=1e-5)


def test_loads_at_another_size(tmp_path):
    """The position embedding is resampled, the adaptive RPE extended as it is."""
    model = create('dearkd_nano_patch4_32', num_classes=5)
    timm.models.save_for_hf(model, str(tmp_path), safe_serialization=True)
    larger = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, img_size=48)
    assert larger.pos_embed.shape == (1, 145, 96) and larger.blocks[3].attn.rpe.grid_size == (12, 12)
    for ours, theirs in zip(larger.blocks[:4], model.blocks):
        assert ours.attn.rpe.delta.equal(theirs.attn.rpe.delta)
    same = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    x = images(model)
    torch.testing.assert_close(same(x), model(x))


@pytest.mark.slow
@pytest.mark.parametrize('name', SMALL)
@pytest.mark.parametrize('training', [True, False])
def test_torchscript(name, training):
    model = create(name).train(training)
    scripted = torch.jit.script(model)
    x = images(model)
    torch.testing.assert_close(scripted(x), model(x), atol=1e-5, rtol=1e-5)
    buffer = io.BytesIO()
    torch.jit.save(scripted, buffer)
    buffer.seek(0)
    torch.testing.assert_close(torch.jit.load(buffer)(x), model(x), atol=1e-5, rtol=1e-5)


def test_torchscript_at_another_size():
    model = create()
    scripted = torch.jit.script(model)
    for size in ((96, 64), (160, 160)):
        x = torch.randn(1, 3, *size)
        torch.testing.assert_close(scripted(x), model(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('name', SMALL)
@pytest.mark.parametrize('grad', [True, False])
def test_trace(name, grad):
    model = create(name)
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(model, images(model))
        x = images(model, batch_size=3)
        torch.testing.assert_close(traced(x), model(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('training', [True, False])
def test_traces_are_saved(training):
    model = create('dearkd_nano_patch4_32').train(training)
    traced = torch.jit.trace(model, images(model))
    buffer = io.BytesIO()
    torch.jit.save(traced, buffer)
    buffer.seek(0)
    x = images(model)
    torch.testing.assert_close(torch.jit.load(buffer)(x), model(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('grad', [True, False])
def test_fx(grad):
    from timm.layers import create_feature_extractor
    model = create('dearkd_nano_patch4_32')
    x = images(model)
    with torch.set_grad_enabled(grad):
        expected = model(x)
        torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), expected, atol=1e-5, rtol=1e-5)
        extractor = create_feature_extractor(model, return_nodes=['blocks.2.mlp.fc2', 'head'])
        torch.testing.assert_close(extractor(x)['head'], expected, atol=1e-5, rtol=1e-5)
        # a traced graph follows the parameters
        graph = torch.fx.symbolic_trace(model)
        model.blocks[0].attn.rpe.alpha.data.add_(1)
        torch.testing.assert_close(graph(x), model(x), atol=1e-5, rtol=1e-5)


def test_fx_backward():
    model = create('dearkd_nano_patch4_32').train()
    graph = torch.fx.symbolic_trace(model)
    graph(images(model)).square().mean().backward()
    assert all(p.grad is not None for p in graph.parameters())


def create_shallow(name, **kwargs):
    """A registered model with two narrow blocks and 3x3 patches."""
    patch = 4 if name.endswith('_32') else 16
    model = create(name, depth=2, embed_dim=48, num_mhca_blocks=1, img_size=3 * patch, num_classes=7, **kwargs)
    return model, patch


def trace_as_timm(model):
    """Return the graph of the whole model, traced as timm's own tests do it, as a function to the logits."""
    nodes = timm.layers.get_graph_node_names(model)[not model.training]
    return timm.models.GraphExtractNet(model, [nodes[-1]])


@pytest.mark.parametrize('name,dynamic', [(name, True) for name in NAMES] + [('dearkd_from', False)])
def test_fx_graphs_compute_what_the_model_does(name, dynamic):
    model, patch = create_shallow(name, dynamic_img_size=dynamic)
    graph = trace_as_timm(model)
    state = {key: value.clone() for key, value in graph.state_dict().items()}
    with torch.no_grad():
        for grid in [(3, 3), (2, 5), (4, 3), (3, 3)] if dynamic else [(3, 3)]:
            x = torch.randn(2, 3, *(side * patch for side in grid))
            torch.testing.assert_close(graph(x), model(x), atol=1e-5, rtol=1e-5)
    assert all(value.equal(state[key]) for key, value in graph.state_dict().items())


@pytest.mark.parametrize('name,dynamic', [('test_dearkd', True), ('dearkd_from', True), ('test_dearkd', False)])
def test_fx_graphs_can_be_scripted(name, dynamic):
    model, patch = create_shallow(name, dynamic_img_size=dynamic)
    scripted = torch.jit.script(trace_as_timm(model).graph_module)
    for grid in [(3, 3), (2, 5), (3, 3)] if dynamic else [(3, 3)]:
        x = torch.randn(2, 3, *(side * patch for side in grid))
        out, = scripted(x).values()
        torch.testing.assert_close(out, model(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('mode', ['element', 'query'])
def test_fx_graphs_train_at_any_size(mode):
    model, _ = create_shallow('test_dearkd', rpe_drop_rate=0.5, rpe_drop_mode=mode)
    model.train()
    graph = trace_as_timm(model)
    x = torch.randn(2, 3, 32, 80)
    results = []
    for network in (model, graph):
        model.zero_grad()
        graph.zero_grad()
        torch.manual_seed(1)  # the same scores are dropped
        out = network(x)
        out.square().mean().backward()
        results.append((out, {name.removeprefix('graph_module.'): p.grad for name, p in network.named_parameters()}))
    torch.testing.assert_close(*(out for out, _ in results))
    assert results[0][1].keys() == results[1][1].keys()
    for name, grad in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], grad, msg=name)


def test_fx_graphs_in_half_precision():
    """On a grid whose |p|^2 bfloat16 cannot hold, though it can hold that of the traced grid."""
    model, _ = create_shallow('test_dearkd', dtype=torch.bfloat16, patch_size=4)
    x = torch.randn(1, 3, 80, 84, dtype=torch.bfloat16)
    model.train()  # the factorised form
    torch.testing.assert_close(trace_as_timm(model)(x), model(x))


def test_fx_graph_of_two_models():
    """Each keeps the grid of its own input."""
    class Pair(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.large, self.small = (create_shallow('test_dearkd')[0] for _ in range(2))

        def forward(self, x):
            return self.large(x) + self.small(x[:, :, :32, :16])

    pair = Pair().eval()
    nodes = timm.layers.get_graph_node_names(pair)[1]
    x = torch.randn(2, 3, 48, 64)
    torch.testing.assert_close(timm.models.GraphExtractNet(pair, [nodes[-1]])(x), pair(x), atol=1e-5, rtol=1e-5)


def test_features_only_by_fx():
    model = create('test_dearkd', img_size=48)
    features = timm.create_model(
        'test_dearkd', img_size=48, features_only=True, feature_cls='fx', out_indices=(1, 4)).eval()
    features.load_state_dict({
        f'graph_module.{name}': value for name, value in model.state_dict().items()
        if f'graph_module.{name}' in features.state_dict()})
    x = torch.randn(2, 3, 32, 64)
    expected = []
    for index in (1, 4):
        model.blocks[index].register_forward_hook(lambda module, args, out: expected.append(out))
    model(x)
    for feature, tokens in zip(features(x), expected, strict=True):
        torch.testing.assert_close(feature, tokens, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('name', SMALL)
@pytest.mark.parametrize('grad', [True, False])
def test_export(name, grad):
    model = create(name)
    batch = torch.export.Dim('batch', min=2, max=64)
    with torch.set_grad_enabled(grad):
        program = torch.export.export(model, (images(model),), dynamic_shapes=({0: batch},))
        x = images(model, batch_size=5)
        torch.testing.assert_close(program.module()(x), model(x), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('name', SMALL)
def test_onnx(name, tmp_path):
    onnxruntime = pytest.importorskip('onnxruntime')
    pytest.importorskip('onnxscript')
    model = create(name)
    path = tmp_path / 'model.onnx'
    with torch.no_grad():
        torch.onnx.export(
            model, (images(model),), path, dynamo=True, verbose=False,
            dynamic_shapes=({0: torch.export.Dim('batch', min=2, max=64)},))
    x = images(model, batch_size=3)
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    out = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(out), model(x), atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize('training', [True, False])
def test_compile(training):
    """No graph break in training and in inference, and the same numbers."""
    model = create('dearkd_nano_patch4_32').train(training)
    x = images(model)
    compiled = torch.compile(model, backend='aot_eager', fullgraph=True)
    with torch.set_grad_enabled(training):
        expected, out = model(x), compiled(x)
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
        if training:
            grads = [torch.autograd.grad(o.square().mean(), model.blocks[0].attn.rpe.delta)[0] for o in (expected, out)]
            torch.testing.assert_close(*grads, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_compile_with_dynamic_img_size():
    model = create()
    compiled = torch.compile(model, backend='eager')
    for size in ((160, 160), (96, 128), (160, 160)):
        x = torch.randn(1, 3, *size)
        torch.testing.assert_close(compiled(x), model(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('training', [True, False])
def test_replicas_of_data_parallel(training, monkeypatch):
    """As its own `replicate` makes them, with the copying between devices, of which there is one, left out."""
    module = importlib.import_module('torch.nn.parallel.replicate')
    monkeypatch.setattr(module, '_get_device_index', lambda *args: 0)
    monkeypatch.setattr(
        module, '_broadcast_coalesced_reshape',
        lambda tensors, devices, detach=False: [[t.detach() if detach else t * 1. for t in tensors] for _ in devices])
    model = timm.create_model('test_dearkd', num_classes=3, img_size=32).train(training)
    x = torch.randn(2, 3, 32, 32)
    with torch.set_grad_enabled(training):
        for replica in module.replicate(model, [0, 0], detach=not training):
            torch.testing.assert_close(replica(x), model(x))


def test_parametrised_positions():
    """Such as an alpha that is kept positive."""
    model = timm.create_model('test_dearkd', num_classes=3, img_size=32).eval()
    x = torch.randn(2, 3, 32, 32)
    expected = model(x)
    for block in model.blocks:
        if hasattr(block.attn, 'rpe'):
            for name in ('alpha', 'delta'):
                torch.nn.utils.parametrize.register_parametrization(block.attn.rpe, name, torch.nn.Identity())
    torch.testing.assert_close(model(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected)


def test_ddp_sends_no_constants(tmp_path):
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        model = timm.create_model('test_dearkd', img_size=32)
        assert not torch.nn.parallel.DistributedDataParallel(model).will_sync_module_buffers()
        compiled = torch.compile(timm.create_model('test_dearkd', img_size=32), backend='eager')
        keep_constants_local(compiled)  # under their names with a prefix, as train.py has it for timm's own tasks
        assert not torch.nn.parallel.DistributedDataParallel(compiled).will_sync_module_buffers()
    finally:
        torch.distributed.destroy_process_group()


def test_copies_and_pickles():
    model = create()
    x = images(model)
    with torch.no_grad():
        expected = model(x)
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
            assert other.blocks[0].attn.rpe._scores_cache is None
            torch.testing.assert_close(other(x), expected)


def test_attention_maps_are_found_by_timm():
    """timm's AttentionExtract sees the maps of an unfused model."""
    from timm.utils.attention_extract import AttentionExtract
    model = create('dearkd_nano_patch4_32')
    for block in model.blocks:
        block.attn.fused_attn = False
    maps = AttentionExtract(model, method='hook')(images(model))
    assert len(maps) == 6 and all(m.shape == (2, 12, 65, 65) for m in maps.values())


@pytest.mark.parametrize('kwargs,message', [
    (dict(num_mhca_blocks=7), 'has 6 blocks'),
    (dict(patch_drop_rate=0.1), 'patch_drop_rate'),
    (dict(attn_layer='diff'), 'DiffAttention'),
    (dict(rpe_drop_rate=2.), 'expected a rate'),
])
def test_errors(kwargs, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model('dearkd_nano_patch4_32', **kwargs)
