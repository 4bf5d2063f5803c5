"""Networks named by a factory: built, saved by name, loaded again; strangers' names and arguments refused."""

import json
import sys

import pytest
import torch
from faults import one_line
from torch import nn

from medsketch.commands.train import dry_run
from medsketch.models import factory
from medsketch.models.factory import build, make_network, network_spec, register, try_network, without_memory
from medsketch.models.unet import UNetRenderer

UNET = {
    'factory': 'monai.networks.nets:BasicUNet',
    'tanh': True,
    'kwargs': {'spatial_dims': 2, 'in_channels': 1, 'out_channels': 3, 'features': (8, 8, 8, 8, 8, 8)},
}


def changed(**kwargs):
    return UNET | {'kwargs': UNET['kwargs'] | kwargs}


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    "What a test registers is forgotten after it"
    monkeypatch.setattr(factory, 'REGISTERED', {})
    monkeypatch.setattr(factory, 'ALLOWED', list(factory.ALLOWED))


def test_a_monai_unet_is_a_renderer():
    net, x = make_network(UNET, None, 1, 3, 32), torch.rand(2, 1, 32, 32) * 2 - 1
    assert net.training and type(net.net).__name__ == 'BasicUNet'
    y = net(x)
    assert y.shape == (2, 3, 32, 32) and y.abs().max() <= 1
    y.square().mean().backward()
    assert all(p.grad is not None for p in net.parameters())
    net.eval()
    with torch.no_grad():
        torch.testing.assert_close(net(x), torch.tanh(net.net(x)))
        fast = net.for_inference(torch.bfloat16)
        assert not any(p.requires_grad for p in fast.parameters()) and fast(x).dtype == torch.float32
        assert (fast(x) - net(x)).abs().max() < 0.1


def test_a_spec_comes_back_from_json():
    saved = json.dumps(network_spec(UNET))
    a, b = build(UNET).eval(), build(json.loads(saved)).eval()
    b.load_state_dict(a.state_dict())
    x = torch.rand(1, 1, 32, 32)
    assert torch.equal(a(x), b(x)) and json.dumps(network_spec(json.loads(saved))) == saved


def test_what_is_built_first_is_what_is_built_later():
    "JSON makes lists of tuples and text of numbers: the first build sees that already"
    seen = []
    register('odd', lambda **kwargs: seen.append(kwargs) or nn.Identity())
    spec = {'factory': 'odd', 'kwargs': {'sizes': (1, 2), 'widths': {4: 8}}}
    build(spec), build(json.loads(json.dumps(network_spec(spec))))
    assert seen[0] == seen[1] == {'sizes': [1, 2], 'widths': {'4': 8}}


def test_a_function_of_ones_own():
    @register('small')
    def small(width=4):
        return nn.Sequential(nn.Conv2d(1, width, 1), nn.Conv2d(width, 3, 1))

    assert small(2)[0].out_channels == 2  # the decorator leaves the function alone
    assert build('small').net[0].out_channels == 4
    assert make_network({'factory': 'small', 'kwargs': {'width': 7}}, None, 1, 3, 16).net[0].out_channels == 7
    factory.REGISTERED.clear()  # another session, which did not import it
    with pytest.raises(ValueError, match=r"register\('small', fn\)") as e:
        build('small')
    assert one_line(e)


def test_ours_and_none():
    ours = build({'factory': 'medsketch.models.unet:UNetRenderer', 'kwargs': {'size': 16, 'ngf': 4}})
    assert isinstance(ours, UNetRenderer)
    assert make_network(None, lambda: 'the default') == 'the default'


def test_a_package_of_ones_own(monkeypatch):
    with pytest.raises(ValueError, match='no known network'):
        build({'factory': 'torch.nn:Conv2d', 'kwargs': {}})
    factory.ALLOWED.append('torch.nn')
    net = build({'factory': 'torch.nn:Conv2d', 'kwargs': {'in_channels': 1, 'out_channels': 3, 'kernel_size': 1}})
    assert isinstance(net.net, nn.Conv2d)


HOSTILE = [
    'medsketch.models.factory:FromElsewhere.forward',
    'os:system',
    'builtins:eval',
    'subprocess:Popen',
    'torch:load',
    'torch.hub:load',
    'monai.networks_evil:Net',
    'monai.networks:os.system',
    'medsketch.__main__:x',
    'monai.bundle:load',
    'medsketch',
    'medsketch:',
    ':system',
    '',
    'monai.networks.nets:BasicUNet\n',
    'medsketchy.nets:Net',
    'monai.networks.nets.__init__:BasicUNet',
]
NO_NETWORK = [
    'medsketch.core:save_png',
    'medsketch.core:os',
    'medsketch.models.unet:nn',
    'medsketch.models.unet:copy',
    'monai.networks.nets:resnet18',
    'monai.networks.utils:save_state',
    'medsketch.recipes.skrgan:SkrGAN',
    'monai.networks.trt_compiler:TrtCompiler',
]


@pytest.mark.parametrize('name', HOSTILE + NO_NETWORK)
def test_a_stranger_runs_nothing(name, monkeypatch, tmp_path):
    "Names outside the list are not even imported; functions, modules and other classes inside it are not called"
    import importlib

    real, asked = importlib.import_module, []
    monkeypatch.setattr(factory.importlib, 'import_module', lambda *a: asked.append(a[0]) or real(*a))
    with pytest.raises(ValueError) as e:
        build({'factory': name, 'kwargs': {'command': f'touch {tmp_path}/x'}})
    assert one_line(e) and not list(tmp_path.iterdir())
    assert asked[:1] == ([name.partition(':')[0]] if name in NO_NETWORK else [])  # MONAI imports more in its turn
    assert 'register(' in str(e.value)


def test_a_class_imported_into_an_allowed_module_is_not_of_it(monkeypatch):
    "`torch.nn` stands in many a module's namespace"
    from medsketch.models import unet

    monkeypatch.setattr(unet, 'Linear', nn.Linear, raising=False)
    with pytest.raises(ValueError, match='not a network class'):
        build({'factory': 'medsketch.models.unet:Linear', 'kwargs': {'in_features': 1, 'out_features': 1}})


@pytest.mark.parametrize(
    'kwargs',
    [
        {'pretrained': True},
        {'pretrained_url': 'x'},
        {'backbone': '../../etc/passwd'},
        {'options': {'weights': 'a.pt'}},
        {'layers': ['http://example.org/w.pt']},
        {'checkpoint_dir': 'w'},
        {'name': 'c:\\w.pt'},
    ],
)
def test_arguments_that_read_files_are_refused(kwargs):
    with pytest.raises(ValueError, match='opens no files') as e:
        build(changed(**kwargs))
    assert one_line(e)


def test_pretrained_false_is_harmless_and_registered_functions_are_free():
    with pytest.raises(ValueError, match='cannot be built'):
        build(changed(pretrained=False))  # not an argument of it
    register('free', lambda path: nn.Identity())
    assert build({'factory': 'free', 'kwargs': {'path': 'a/b.pt'}})


WRONG = {
    '(2, 3, 32, 32) is needed': changed(out_channels=1),
    'does not take (2, 1, 32, 32)': changed(in_channels=3),
    'unexpected keyword': changed(depth=4),
    "has no attribute 'Nothing'": {'factory': 'monai.networks.nets:Nothing'},
    'No module named': {'factory': 'medsketch.models.nothing:Net'},
    "'arguments'": {'factory': 'a', 'arguments': {}},
    "use {'factory'": {'kwargs': {}},
    'a Conv2d has no name': nn.Conv2d(1, 3, 1),
    'a type has no name': UNetRenderer,
    'must be numbers': changed(act=nn.ReLU),
    'instead of one tensor': 'two',
    'makes a int': 'number',
}


@pytest.mark.parametrize('text', WRONG)
def test_what_does_not_fit_is_refused_in_a_line(text):
    class Two(nn.Module):
        def forward(self, x):
            return [x, x]

    register('two', Two), register('number', lambda: 5)
    with pytest.raises(ValueError) as e:
        make_network(WRONG[text], None, 1, 3, 32)
    assert text in str(e.value) and one_line(e)


def test_trying_a_network_changes_nothing():
    net = nn.Sequential(nn.Conv2d(1, 3, 1), nn.BatchNorm2d(3), nn.Dropout(0.5))
    before, rng = {k: v.clone() for k, v in net.state_dict().items()}, torch.get_rng_state()
    assert try_network(net, 1, 3, 8) is net and net.training and net[2].training
    assert torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


class Counting(nn.Module):
    "A network that computes with numbers while it is built, as SwinUNETR does"

    def __init__(self):
        super().__init__()
        rates = [r.item() for r in torch.linspace(0, 0.5, 3)]
        self.body = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.Dropout(rates[1]))

    def forward(self, x):
        return self.body(x)


def test_shapes_come_without_memory_and_without_imports():
    from medsketch.recipes import RECIPES

    for cls in RECIPES.values():
        there = set(sys.modules)
        shape, real = without_memory(lambda cls=cls: cls.preset('tour')), cls.preset('tour')
        assert len(set(sys.modules) - there) < 20, cls.name
        for name, net in real.nets.items():
            mine = shape.nets[name].state_dict()
            assert {k: (t.shape, t.dtype) for k, t in mine.items()} == {
                k: (t.shape, t.dtype) for k, t in net.state_dict().items()
            }
            assert all(t.is_meta for t in mine.values())


def test_a_network_that_computes_while_it_is_built_is_not_refused(tmp_path):
    from medsketch.recipes import SkrGAN, load_recipe

    register('counting', Counting)
    assert without_memory(lambda: make_network('counting', None, 1, 3, 16)) is None
    r = SkrGAN.preset('tour', size=16, renderer='counting')
    r.save(tmp_path / 'r.safetensors')
    assert load_recipe(tmp_path / 'r.safetensors').config == r.config
    assert dry_run(SkrGAN, r.config) == r.config
