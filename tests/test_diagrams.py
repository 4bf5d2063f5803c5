"The pages' diagrams: what they say of shapes is compared with networks at work, and their stored pictures are theirs."

import ast
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from medsketch.data import phantom_data
from medsketch.diagrams import traffic, untrue
from medsketch.models.adalin import AttentionGenerator
from medsketch.models.dcgan import DCDiscriminator, DCGenerator
from medsketch.models.encoder import SketchEncoder
from medsketch.models.fib import GrowingGenerator, ResidualGenerator
from medsketch.models.hyper import HyperNetwork
from medsketch.models.patchgan import PatchDiscriminator
from medsketch.models.pggan import PGGenerator
from medsketch.models.resnet import Backbone
from medsketch.models.solov2 import SOLOv2
from medsketch.models.stylegan2 import StyleGenerator
from medsketch.models.stylegan2_d import ResidualDiscriminator
from medsketch.models.unet import UNetRenderer
from medsketch.recipes import RECIPES

ROOT = Path(__file__).resolve().parents[1]


def cells(page):
    "The code cells of a page"
    found = json.loads((ROOT / f"nbs/{page}.ipynb").read_text(encoding="utf-8"))["cells"]
    return [c for c in found if c["cell_type"] == "code"]


def diagram(page):
    "A page's first diagram, and the cell it stands in"
    all_cells = [("".join(c["source"]), c) for c in cells(page)]
    i = next(i for i, (source, _) in enumerate(all_cells) if re.search(r"^Diagram\(", source, re.MULTILINE))
    code, names = ast.parse(all_cells[i][0]), {}
    *before, last = code.body
    exec("\n".join([all_cells[i - 1][0], *map(ast.unparse, before)]), names)  # noqa: S102  the project's own pages
    return eval(ast.unparse(last), names), all_cells[i][1]


def at_work(r, data, more=None):
    "One step of every phase of every stage, fully grown: which shapes the networks saw"
    data, more, _ = r.prepare(data, more)
    if r.fade:
        r.fade.jump(r.fade.growth.steps)

    def run():
        nets = SimpleNamespace(**r.nets)
        for stage in r.stages(data, more):
            if stage.steps:
                batch = next(iter(stage.batches()))
                for phase in stage.phases:
                    phase.loss(nets, batch)

    return traffic(r.nets, run)


SYSTEMS = {
    "06_recipes/01_skrgan": ("skrgan", "chest_xray", {"channels": 1, "style": "chest_xray", "joint_steps": 1}),
    "06_recipes/03_dualgan": ("dualgan", "fundus", {"classes": 2}),
    "06_recipes/05_pgsgan": ("pgsgan", "ultrasound", {}),
    "06_recipes/06_stylegan2": ("stylegan2", "fundus", {}),
    "06_recipes/08_pggan": ("pggan", "fundus", {"seg": "vessel", "encoder_steps": 1}),
    "06_recipes/08_sketch_synth": ("sketch_synth", "pharynx", {}),
    "06_recipes/10_sketch2medi": ("sketch2medi", "pharynx", {}),
    "06_recipes/11_pix2pix": ("pix2pix", "pharynx", {}),
    "06_recipes/12_cyclegan": ("cyclegan", "pharynx", {}),
    "06_recipes/13_unit": ("unit", "pharynx", {}),
    "06_recipes/14_ugatit": ("ugatit", "pharynx", {}),
}


def of(name, kind, **changes):
    "A recipe at the tour scale, and what its networks saw of a few phantoms"
    torch.manual_seed(0)
    r = RECIPES[name].preset("tour", **changes | {"batch_size": 2})
    return at_work(r, phantom_data(kind, 4, r.config["size"]))


@pytest.mark.parametrize("page", SYSTEMS)
def test_a_system_has_the_shapes_that_its_diagram_says(page):
    name, kind, changes = SYSTEMS[page]
    assert untrue(diagram(page)[0], of(name, kind, **changes)) == []


@pytest.mark.parametrize("name", ["dcgan", "acgan", "wgan", "wgan_gp", "pggan"])
def test_every_baseline_has_the_shapes_of_their_diagram(name):
    assert untrue(diagram("06_recipes/02_baselines")[0], of(name, "fundus")) == []


def hyper_seen():
    G = StyleGenerator(32, 3, 32, 32, 512, 32, depth=2)
    H = HyperNetwork(G.synthesis, 32, 3, 18, 0.25, 16)
    return traffic({"G": G, "H": H}, lambda: H(torch.zeros(2, 1, 32, 32), G(torch.zeros(2, 32))))


def fade_in_seen():
    G = GrowingGenerator(ResidualGenerator(3, 1, 4, 1), 32, 64, 3, 1, 4, 0.5)
    return traffic({"G": G}, lambda: G(torch.zeros(2, 3, 64, 64), 0.3))


def seen(name, net, *given):
    return traffic({name: net}, lambda: net(*given))


def dcgan_seen():
    G, D = DCGenerator(64), DCDiscriminator(64)
    return traffic({"G": G, "D": D}, lambda: D(G(torch.zeros(2, 100))))


NETWORKS = {
    "04_models/01_dcgan": dcgan_seen,
    "04_models/02_pggan": lambda: seen("G", PGGenerator(32, 3, 32, 256, 32), torch.zeros(2, 32), 16, 0.3),
    "04_models/03_unet": lambda: seen("G_P", UNetRenderer(64, 1, 3, 16, 64, 3), torch.zeros(2, 1, 64, 64)),
    "04_models/04_patchgan": lambda: seen("D_P", PatchDiscriminator(4), *torch.zeros(2, 4, 128, 128).split([3, 1], 1)),
    "04_models/06_fib": fade_in_seen,
    "04_models/08_stylegan2": lambda: seen("G", StyleGenerator(32, 3, 32, 32, 512, 32, depth=2), torch.zeros(2, 32)),
    "04_models/09_stylegan2_d": lambda: seen("D", ResidualDiscriminator(16, 3, 512, 32), torch.zeros(4, 3, 16, 16)),
    "04_models/10_resnet": lambda: traffic({"net": (net := Backbone()).net}, lambda: net(torch.zeros(2, 3, 64, 64))),
    "04_models/11_solov2": lambda: seen(
        "S", SOLOv2(3, 4, 18, 0.25, (20, 18, 12, 8, 6), 1, 1), torch.zeros(2, 3, 64, 64)
    ),
    "04_models/12_encoder": lambda: seen("E", SketchEncoder(64, 10, 32, 18, 0.25), torch.zeros(2, 1, 64, 64)),
    "04_models/13_hyper": hyper_seen,
    "04_models/14_adalin": lambda: seen("G", AttentionGenerator(3, 8, 1), torch.zeros(2, 3, 32, 32)),
}


@pytest.mark.parametrize("page", NETWORKS)
def test_a_network_has_the_shapes_that_its_diagram_says(page):
    assert untrue(diagram(page)[0], NETWORKS[page]()) == []


@pytest.mark.parametrize("page", [*SYSTEMS, "06_recipes/02_baselines", *NETWORKS])
def test_the_stored_picture_is_the_diagram_of_its_list(page):
    shown, cell = diagram(page)
    (output,) = cell["outputs"]
    assert "".join(output["data"]["image/svg+xml"]) == shown.svg()
    assert "".join(output["data"]["text/plain"]) == str(shown)
    assert len(shown.svg()) < 60_000


PAGES = sorted(p.relative_to(ROOT / "nbs").as_posix() for p in (ROOT / "nbs").rglob("*.ipynb") if "/." not in str(p))
SLUG = re.compile(r"[^\w\s-]")


def text(page):
    "The Markdown of a page, code blocks aside"
    found = json.loads((ROOT / "nbs" / page).read_text(encoding="utf-8"))["cells"]
    return "\n\n".join("".join(c["source"]) for c in found if c["cell_type"] == "markdown")


def words(said):
    "Words in small letters, without what joins them"
    return set(re.findall(r"[^\W_]+", said.lower()))


def slug(heading):
    "The address of a heading on the website"
    return re.sub(r"\s+", "-", SLUG.sub("", heading.lower()).strip())


def terms():
    "Term, what the glossary says of it, and the page that it points to"
    parts = re.split(r"^### (.+)$", text("glossary.ipynb"), flags=re.MULTILINE)[1:]
    return [(t, said, re.search(r"→ \[[^\]]+\]\(([^)]+)\)", said)) for t, said in zip(parts[::2], parts[1::2])]


def test_the_glossary_is_in_order_and_each_term_stands_once():
    names = [t for t, *_ in terms()]
    assert len(names) > 60 and names == sorted(names, key=str.lower) and len(set(map(slug, names))) == len(names)


@pytest.mark.parametrize("term, said, link", terms(), ids=lambda x: x if isinstance(x, str) and len(x) < 40 else "")
def test_a_term_is_said_in_short_and_explained_where_its_link_leads(term, said, link):
    assert link, "no page"
    code = "\n".join("".join(c["source"]) for c in cells(link[1].removesuffix(".ipynb")))
    page = (text(link[1]) + code).lower()
    assert all(w in page for w in words(term)), "its page does not use the word"
    plain = re.split(r"In the papers:|→", said)[0]
    assert 1 <= len(re.findall(r"[.:?](?=\s)", plain.strip() + " ")) <= 4 and len(plain.split()) <= 45


def test_links_into_the_glossary_meet_a_term():
    known = {slug(t) for t, *_ in terms()}
    found = [(p, a) for p in PAGES for a in re.findall(r"\]\((?:\.\./)?glossary\.ipynb#([^)]+)\)", text(p))]
    found += [("glossary.ipynb", a) for a in re.findall(r"\]\(#([^)]+)\)", text("glossary.ipynb"))]
    assert len(found) > 20 and not [x for x in found if x[1] not in known]
