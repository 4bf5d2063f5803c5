"""A model for others: what is written, what is refused, and that nothing leaves the machine unasked."""

import base64
import hashlib
import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from faults import contents
from safetensors import safe_open

from medsketch import cli, share
from medsketch.pretrained import load


def run(capsys, *words):
    "Exit status, and what was printed"
    with pytest.raises(SystemExit) as e:
        cli.main(list(words))
    out = capsys.readouterr()
    return e.value.code, out.out + out.err


def test_a_prepared_repository_loads_and_names_no_folder(tmp_path, capsys):
    code, said = run(capsys, 'push', 'fundus', 'someone/eyes', '--to', str(tmp_path / 'repo'), '--licence', 'cc-by-4.0')
    assert code == 0 and 'nothing was uploaded' in said
    assert sorted(p.name for p in (tmp_path / 'repo').iterdir()) == ['README.md', 'weights.safetensors']
    card = (tmp_path / 'repo/README.md').read_text('utf-8')
    assert card.startswith('---\n') and 'license: cc-by-4.0' in card and str(tmp_path) not in card
    x = torch.rand(1, 256, 256)
    assert torch.equal(load(tmp_path / 'repo').render(x), load('fundus').render(x))


@pytest.mark.parametrize(
    'words, why',
    [
        (['push', 'fundus', 'eyes', '--to', 'R'], 'no name for the Hub'),
        (['push', 'fundus', '../../etc', '--to', 'R'], 'no name for the Hub'),
        (['push', 'nothing', 'a/b', '--to', 'R'], 'no weights are called nothing'),
        (['push', 'fundus', 'a/b', '--to', ''], '--to is empty'),
        (['push', 'fundus', 'a/b', '--to', 'R', '--privacy', 'P'], 'is not what'),
        (['push', 'fundus', 'a/b', '--to', 'R', '--privacy', 'missing'], 'No such file'),
        (['onnx', 'fundus', '--out', 'x.pt'], 'ends in .onnx'),
        (['onnx', 'nothing', '--out', 'x.onnx'], 'no weights are called nothing'),
        (['onnx', 'fundus'], "Missing option '--out'"),
    ],
)
def test_what_cannot_be_shared_is_one_line_and_writes_nothing(tmp_path, monkeypatch, capsys, words, why):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'P').write_text('{"alarm": "no"}')
    before = contents(tmp_path)
    code, said = run(capsys, *words)
    assert code and why in said and said.count('\n') == 1 and contents(tmp_path) == before


def test_copies_of_patients_are_not_uploaded(tmp_path):
    class Hub:
        def __getattr__(self, name):
            raise AssertionError(f'{name} was called')

    with pytest.raises(ValueError, match='not uploaded'):
        share.push('fundus', 'a/b', api=Hub(), privacy={'alarm': True})


def test_a_file_that_was_there_stays(tmp_path, capsys):
    (tmp_path / 'README.md').write_text('mine')
    code, said = run(capsys, 'push', 'fundus', 'a/b', '--to', str(tmp_path))
    assert code == 1 and 'there already' in said and (tmp_path / 'README.md').read_text() == 'mine'
    (tmp_path / 'x.onnx').write_text('mine')
    code, said = run(capsys, 'onnx', 'fundus', '--out', str(tmp_path / 'x.onnx'))
    assert code == 1 and 'there already' in said and (tmp_path / 'x.onnx').read_text() == 'mine'


def test_a_converted_file_that_differs_is_not_written(tmp_path, monkeypatch):
    ort = pytest.importorskip('onnxruntime', reason="medsketch[onnx] is not installed")

    class Wrong:
        def __init__(self, *a, **k):
            pass

        def run(self, _, feed):
            return [feed['sketch'].repeat(3, 1) * 0 + 2]

    monkeypatch.setattr(ort, 'InferenceSession', Wrong)
    from medsketch.recipes import SkrGAN

    r = SkrGAN(16, fmap_base=32, fmap_max=8, latent_dim=8, ngf=4, ndf=4, receptive_field=16)
    with pytest.raises(RuntimeError, match='differ'):
        share.to_onnx(r, tmp_path / 'x.onnx')
    assert not list(tmp_path.iterdir())


def test_a_renderer_without_pytorch_draws_the_same(tmp_path, capsys):
    ort = pytest.importorskip('onnxruntime', reason="medsketch[onnx] is not installed")
    from medsketch.recipes import SkrGAN

    r = SkrGAN(16, fmap_base=32, fmap_max=8, latent_dim=8, ngf=4, ndf=4, receptive_field=16)
    r.save(tmp_path / 'r.safetensors')
    code, said = run(capsys, 'onnx', str(tmp_path / 'r.safetensors'), '--out', str(tmp_path / 'x.onnx'))
    assert code == 0 and 'differs from PyTorch by' in said
    session = ort.InferenceSession(str(tmp_path / 'x.onnx'), providers=['CPUExecutionProvider'])
    for n in (1, 3):
        s = torch.rand(n, 1, 16, 16).round()
        [image] = session.run(None, {'sketch': s.numpy()})
        torch.testing.assert_close(torch.from_numpy(image) * 2 - 1, r.render(s).cpu(), atol=1e-4, rtol=0)


def test_the_same_weights_are_the_same_file(tmp_path):
    "In every process: safetensors writes its notes in an order of chance"
    line = "import sys; from medsketch.pretrained import load; load('lung_ct').save(sys.argv[1])"
    files = [tmp_path / f'{i}.safetensors' for i in range(4)]
    for f in files:
        subprocess.run([sys.executable, '-c', line, f], check=True)
    assert len({f.read_bytes() for f in files}) == 1


def test_saved_weights_say_their_format(tmp_path):
    "The Hub shows the tensors of files that do"
    load('fundus').save(tmp_path / 'w.safetensors')
    with safe_open(tmp_path / 'w.safetensors', 'pt') as f:
        found = f.metadata()
    assert found['format'] == 'pt' and json.loads(found['medsketch'])['recipe'] == 'skrgan'


# ---- the Hub, played by a server of our own -----------------------------------------------------------


class Repositories(BaseHTTPRequestHandler):
    "As much of the Hub as a push and a load need; `self.server.files` is {repository: {name: bytes}}"

    def log_message(self, *args):
        pass

    def answer(self, status=200, body=b'', **headers):
        self.send_response(status)
        for k, v in ({'Content-Length': len(body), 'X-Repo-Commit': 'c' * 40} | headers).items():
            self.send_header(k.replace('_', '-'), str(v))
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(body)

    def do_GET(self):
        repo, _, name = self.path.strip('/').partition('/resolve/main/')
        found = self.server.files.get(repo, {}).get(name.partition('?')[0])
        if found is None:
            return self.answer(404, X_Error_Code='EntryNotFound')
        self.answer(body=found, ETag=f'"{hashlib.sha1(found).hexdigest()}"')

    do_HEAD = do_GET

    def do_POST(self):
        body = self.rfile.read(int(self.headers['Content-Length']))
        if self.headers.get('Authorization') != 'Bearer hf_right':
            return self.answer(401)
        self.answer(body=json.dumps(self.taken(self.path.partition('?')[0], body)).encode())

    def taken(self, path, body):
        "What a request asks for is done: its answer"
        if path == '/api/repos/create':
            self.server.asked.append(json.loads(body))
            return {
                'url': f'https://huggingface.co/{self.server.asked[-1]["organization"]}/{self.server.asked[-1]["name"]}'
            }
        if path == '/api/validate-yaml':
            return {'errors': [], 'warnings': []}
        repo, _, action = path.removeprefix('/api/models/').rpartition('/main')[0].rpartition('/')
        if action == 'preupload':
            names = [f['path'] for f in json.loads(body)['files']]
            return {'files': [{'path': n, 'uploadMode': 'regular', 'shouldIgnore': False} for n in names]}
        for item in map(json.loads, body.splitlines()):
            if item['key'] == 'file':
                v = item['value']
                self.server.files.setdefault(repo, {})[v['path']] = base64.b64decode(v['content'])
        return {'commitUrl': f'https://huggingface.co/{repo}/commit/{"c" * 40}', 'commitOid': 'c' * 40}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    "A server that plays the Hub, which its library takes for it"
    constants = pytest.importorskip('huggingface_hub.constants', reason='medsketch[hub] is not installed')
    server = ThreadingHTTPServer(('127.0.0.1', 0), Repositories)
    server.files, server.asked, server.url = {}, [], f'http://127.0.0.1:{server.server_port}'
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'hf'))
    monkeypatch.setattr(constants, 'HF_HUB_DISABLE_XET', True)
    found_at(monkeypatch, server.url)
    yield server
    server.shutdown(), server.server_close()


def found_at(monkeypatch, url):
    "Where the Hub is, from now on"
    from huggingface_hub import constants, hf_api

    monkeypatch.setattr(constants, 'ENDPOINT', url)
    monkeypatch.setattr(constants, 'HUGGINGFACE_CO_URL_TEMPLATE', url + '/{repo_id}/resolve/{revision}/{filename}')
    assert hf_api.HfApi().endpoint == url
    monkeypatch.setenv('HF_TOKEN', 'hf_right')


def test_what_is_pushed_is_what_others_load(hub, capsys):
    "Through the Hub's own library on both sides"
    code, said = run(capsys, 'push', 'fundus', 'someone/eyes', '--licence', 'cc-by-4.0')
    assert code == 0 and 'https://huggingface.co/someone/eyes' in said, said
    assert hub.asked[0] | {'visibility': 'private'} == hub.asked[0] and set(hub.files) == {'someone/eyes'}
    assert set(hub.files['someone/eyes']) == {'weights.safetensors', 'README.md'}
    assert b'license: cc-by-4.0' in hub.files['someone/eyes']['README.md']
    x = torch.rand(1, 256, 256).round()
    assert torch.equal(load('someone/eyes').render(x), load('fundus').render(x))


def test_a_hub_that_refuses_is_no_hub_that_is_not_there(hub, capsys, monkeypatch):
    monkeypatch.setenv('HF_TOKEN', 'hf_wrong')
    code, said = run(capsys, 'push', 'fundus', 'someone/eyes')
    assert code == 1 and 'the Hub refused someone/eyes' in said and said.count('\n') == 1
    found_at(monkeypatch, 'http://127.0.0.1:9')
    code, said = run(capsys, 'push', 'fundus', 'someone/eyes')
    assert code == 1 and 'was not uploaded; is there a connection?' in said and said.count('\n') == 1
    assert 'refused someone' not in said and not hub.files
