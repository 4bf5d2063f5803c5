"""Weights of other implementations: the stored network in both layouts, files that do not fit, hostile files."""

import argparse
import pickle
import sys
import types
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from faults import one_line
from references import arrays, close

from medsketch.cli import main
from medsketch.recipes import load_recipe
from medsketch.recipes.convert import convert, read_tensors
from medsketch.train.losses import path_lengths, r1_penalty
from medsketch.train.weights import start_from


@pytest.fixture(scope='module')
def refs():
    "The stored arrays"
    return arrays('stylegan2_ada')


def part(refs, name):
    return OrderedDict((k[2:], v.clone()) for k, v in refs.items() if k.startswith(f'{name}:'))


# ---- the two layouts, built here from their published names ----------------------------------


def state_dicts(refs):
    "NVlabs, as state dicts"
    return {'G_ema': part(refs, 'G'), 'D': part(refs, 'D'), 'augment_pipe': None, 'training_set_kwargs': {'path': 'x'}}


class Persistent:
    "An object as NVlabs' code pickles it: a function of theirs, given the source code and the state"

    def __init__(self, meta):
        self.meta = meta

    def __reduce__(self):
        return sys.modules['torch_utils.persistence']._reconstruct_persistent_obj, (self.meta,)


def persistent(flat, table):
    "Modules inside modules, each persistent"
    parameters, buffers, modules = OrderedDict(), OrderedDict(), OrderedDict()
    for k, t in flat.items():
        head, _, rest = k.partition('.')
        if rest:
            modules.setdefault(head, OrderedDict())[rest] = t
        elif head in ('w_avg', 'noise_const', 'resample_filter'):
            buffers[head] = t
        else:
            parameters[head] = torch.nn.Parameter(t)
    modules = OrderedDict((k, persistent(m, table)) for k, m in modules.items())
    state = {'_parameters': parameters, '_buffers': buffers, '_modules': modules, 'training': False, 'z_dim': 32}
    return Persistent(
        table(type='class', version=6, module_src='raise SystemExit', class_name='Generator', state=state)
    )


def nvlabs_pickle(refs, path):
    "A file as their training writes it"
    names = {'torch_utils': {}, 'torch_utils.persistence': {}, 'dnnlib': {}, 'dnnlib.util': {}}
    for name in names:
        sys.modules[name] = types.ModuleType(name)
    util, persistence = sys.modules['dnnlib.util'], sys.modules['torch_utils.persistence']

    class EasyDict(dict):
        pass

    EasyDict.__module__, EasyDict.__qualname__ = 'dnnlib.util', 'EasyDict'
    util.EasyDict = EasyDict

    def _reconstruct_persistent_obj(meta):
        raise AssertionError('run')

    _reconstruct_persistent_obj.__module__ = 'torch_utils.persistence'
    _reconstruct_persistent_obj.__qualname__ = '_reconstruct_persistent_obj'
    persistence._reconstruct_persistent_obj = _reconstruct_persistent_obj
    try:
        content = {'G_ema': persistent(part(refs, 'G'), EasyDict), 'D': persistent(part(refs, 'D'), EasyDict)}
        path.write_bytes(pickle.dumps(content | {'training_set_kwargs': EasyDict(path='x', size=(3, 4))}))
    finally:
        for name in names:
            del sys.modules[name]
    return path


def rosinality(refs):
    "The same numbers under rosinality's names"
    G, D = part(refs, 'G'), part(refs, 'D')
    kernel = G['synthesis.b8.resample_filter'] * 4
    g = {'input.input': G['synthesis.b4.const'][None]}
    for i in range(4):
        for k in ('weight', 'bias'):
            g[f'style.{i + 1}.{k}'] = G[f'mapping.fc{i}.{k}']
    layers = ['b4.conv1', 'b8.conv0', 'b8.conv1', 'b16.conv0', 'b16.conv1', 'b32.conv0', 'b32.conv1']
    for i, layer in enumerate(layers):
        ours, theirs = f'synthesis.{layer}', f'convs.{i - 1}' if i else 'conv1'
        g[f'{theirs}.conv.weight'] = G[f'{ours}.weight'][None]
        g[f'{theirs}.conv.modulation.weight'] = G[f'{ours}.affine.weight']
        g[f'{theirs}.conv.modulation.bias'] = G[f'{ours}.affine.bias']
        g[f'{theirs}.noise.weight'] = G[f'{ours}.noise_strength'][None]
        g[f'{theirs}.activate.bias'] = G[f'{ours}.bias']
        g[f'noises.noise_{i}'] = G[f'{ours}.noise_const'][None, None]
        if layer.endswith('conv0'):
            g[f'{theirs}.conv.blur.kernel'] = kernel
    for i in range(4):
        ours, theirs = f'synthesis.b{4 << i}.torgb', f'to_rgbs.{i - 1}' if i else 'to_rgb1'
        g[f'{theirs}.conv.weight'] = G[f'{ours}.weight'][None]
        g[f'{theirs}.conv.modulation.weight'] = G[f'{ours}.affine.weight']
        g[f'{theirs}.conv.modulation.bias'] = G[f'{ours}.affine.bias']
        g[f'{theirs}.bias'] = G[f'{ours}.bias'][None, :, None, None]
        if i:
            g[f'{theirs}.upsample.kernel'] = kernel
    d = {'convs.0.0.weight': D['b32.fromrgb.weight'], 'convs.0.1.bias': D['b32.fromrgb.bias']}
    for i, r in enumerate((32, 16, 8), 1):
        d |= {
            f'convs.{i}.conv1.0.weight': D[f'b{r}.conv0.weight'],
            f'convs.{i}.conv1.1.bias': D[f'b{r}.conv0.bias'],
            f'convs.{i}.conv2.0.kernel': kernel / 4,
            f'convs.{i}.conv2.1.weight': D[f'b{r}.conv1.weight'],
            f'convs.{i}.conv2.2.bias': D[f'b{r}.conv1.bias'],
            f'convs.{i}.skip.0.kernel': kernel / 4,
            f'convs.{i}.skip.1.weight': D[f'b{r}.skip.weight'],
        }
    d |= {'final_conv.0.weight': D['b4.conv.weight'], 'final_conv.1.bias': D['b4.conv.bias']}
    for i, name in enumerate(('fc', 'out')):
        d |= {f'final_linear.{i}.{k}': D[f'b4.{name}.{k}'] for k in ('weight', 'bias')}
    return {'g_ema': g, 'd': d, 'latent_avg': G['mapping.w_avg']}


def write(kind, refs, folder):
    "A file in one of the layouts"
    path = folder / f'{kind}.pt'
    if kind == 'persistent':
        return nvlabs_pickle(refs, folder / 'network.pkl')
    if kind == 'pickle':
        path = folder / 'network.pkl'
        path.write_bytes(pickle.dumps(state_dicts(refs)))
        return path
    content = state_dicts(refs) if kind == 'state dicts' else rosinality(refs)
    torch.save(content, path, _use_new_zipfile_serialization=kind != 'rosinality, old torch')
    return path


KINDS = ['persistent', 'pickle', 'state dicts', 'rosinality', 'rosinality, old torch']


@pytest.mark.parametrize('kind', KINDS)
def test_images_logits_and_penalties_equal_the_sources(kind, refs, tmp_path):
    r = convert(write(kind, refs, tmp_path))
    c = r.config
    assert (c['size'], c['channels'], c['latent_dim'], c['w_dim'], c['mapping_layers']) == (32, 3, 32, 32, 4)
    assert c['widths'] == {4: 16, 8: 16, 16: 16, 32: 8} and r.learned == {'G', 'D'}
    G, D = r.nets['G'].double(), r.nets['D'].double()
    z, ws, x = (refs[k].double() for k in ('z', 'ws', 'x'))
    close(G.styles(z), ws)
    close(G.styles(z, 0.5), refs['ws_trunc05'])
    close(G(z), refs['img_const'])
    close(G(z, noise='none'), refs['img_none'])
    close(D(x), refs['D_out'])
    ws = ws.requires_grad_()
    noise = refs['pl_noise'].double() * 32  # stored divided by the root of the pixels already
    close(path_lengths(G.synthesis(ws, 'constant'), ws, noise), refs['pl_lengths'])
    close(r1_penalty(D, x), refs['r1'].double().mean())


def test_a_converted_file_is_a_recipe(refs, tmp_path, capsys):
    src = write('rosinality', refs, tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(['convert', str(src), str(tmp_path / 'out.safetensors')])
    out, err = capsys.readouterr()
    assert stop.value.code == 0 and not err and '32 px' in out and 'D and G' in out
    r = load_recipe(tmp_path / 'out.safetensors', 'cpu')
    close(r.nets['G'](refs['z']), refs['img_const'])
    again = type(r)(**r.config)
    assert set(start_from(again.nets, tmp_path / 'out.safetensors')) == {'G', 'D'}  # what --init takes up
    close(again.nets['D'](refs['x']), refs['D_out'])


def test_without_a_mean_style_it_is_computed(refs, tmp_path):
    content = rosinality(refs)
    mean = content.pop('latent_avg')
    del content['d']
    torch.save(content | {'args': argparse.Namespace(size=32)}, tmp_path / 'g.pt')
    r = convert(tmp_path / 'g.pt')
    w = r.nets['G'].mapping(r.noise(4096, 0)).mean(0)
    close(r.nets['G'].mapping.w_avg, w)
    assert r.learned == {'G'} and mean.shape == w.shape


# ---- files that do not fit -------------------------------------------------------------------


def test_all_that_does_not_fit_is_in_one_message(refs, tmp_path):
    content = rosinality(refs)
    g, d = content['g_ema'], content['d']
    del g['convs.1.activate.bias'], d['final_linear.0.bias']
    g['to_rgbs.0.bias'] = torch.zeros(1, 4, 1, 1)
    g['embed.weight'] = torch.zeros(4, 4)
    g['convs.0.conv.blur.kernel'] = torch.ones(4, 4)  # another filter
    torch.save(content, tmp_path / 'bad.pt')
    with pytest.raises(ValueError, match='bad.pt') as e:
        convert(tmp_path / 'bad.pt')
    text = str(e.value)
    for part in (
        'G: convs.1.activate.bias is missing',
        'G: to_rgbs.0.bias is (1, 4, 1, 1), (3,) is needed',
        'G: embed.weight has no place',
        'G: convs.0.conv.blur.kernel has no place',
        'D: final_linear.0.bias is missing',
    ):
        assert part in text
    assert one_line(e)


@pytest.mark.parametrize(
    'content',
    [
        {},
        [1, 2],
        {'g_ema': {'style.1.weight': torch.zeros(2, 2)}},
        {'G_ema': {'synthesis.b4.const': torch.zeros(1)}},
    ],
)
def test_what_is_no_generator_is_refused(content, tmp_path):
    torch.save(content, tmp_path / 'x.pt')
    with pytest.raises(ValueError, match='x.pt') as e:
        convert(tmp_path / 'x.pt')
    assert one_line(e)


# ---- hostile and damaged files ---------------------------------------------------------------


class Payload:
    "What a hostile file makes of `pickle.load`"

    def __init__(self, f, *args):
        self.how = f, args

    def __reduce__(self):
        return self.how


def payloads(mark):
    import builtins
    import os
    import subprocess

    yield Payload(os.mkdir, mark)
    yield Payload(os.system, f'mkdir {mark}')
    yield Payload(builtins.exec, f'import os; os.mkdir({mark!r})')
    yield Payload(builtins.eval, f'__import__("os").mkdir({mark!r})')
    yield Payload(subprocess.call, ['mkdir', mark])
    yield Payload(getattr, Payload(__import__, 'os'), 'mkdir')
    yield Payload(torch.load, mark)
    yield Payload(torch.storage._load_from_bytes, pickle.dumps(Payload(os.mkdir, mark)))
    yield torch.nn.Linear(2, 2)


@pytest.mark.parametrize('i', range(9))
@pytest.mark.parametrize('torch_file', [False, True])
def test_a_hostile_pickle_runs_nothing(i, torch_file, tmp_path):
    mark = str(tmp_path / 'ran')
    content = {'G_ema': {'synthesis.b4.const': list(payloads(mark))[i]}}
    path = tmp_path / 'hostile.pkl'
    if torch_file:
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match='hostile.pkl') as e:
        convert(path)
    assert one_line(e) and not Path(mark).exists()


def test_a_pickle_cannot_change_the_reader_for_the_next(refs, tmp_path):
    "BUILD sets attributes of whatever it is given: it gets functions made for this reading only"
    raw = b'\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x01\x00\x00\x00aK\x01sb.'
    (tmp_path / 'build.pkl').write_bytes(raw)
    try:
        read_tensors(tmp_path / 'build.pkl')
    except ValueError:
        pass
    assert not hasattr(torch._utils._rebuild_tensor_v2, 'a')


@pytest.mark.parametrize('kind', ['pickle', 'rosinality'])
def test_a_file_cut_short_is_one_line(kind, refs, tmp_path):
    path = write(kind, refs, tmp_path)
    data = path.read_bytes()
    for part in (0, 1, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:part])
        with pytest.raises(ValueError, match=path.name) as e:
            convert(path)
        assert one_line(e)


def test_the_command_refuses_in_one_line(tmp_path, capsys):
    for args, text in (
        (['no.pkl', 'out.safetensors'], 'does not exist'),
        (['no.pkl', 'out.pt'], '.safetensors'),
    ):
        with pytest.raises(SystemExit) as stop:
            main(['convert', *(str(tmp_path / a) for a in args)])
        assert stop.value.code == 1 and text in capsys.readouterr().err
