"""`medsketch study` as a reader meets it: keys, buttons, a reload, and answers that are on the disk at once."""

import pytest
from pages import OUT, PATIENCE, medsketch, read_url, server

from medsketch.data import phantom_data
from medsketch.evaluate.study import answers_of, make_study


@pytest.fixture
def study(tmp_path):
    real, drawn = (phantom_data('ultrasound', 3, 128, seed=s) for s in range(2))
    return make_study(tmp_path / 'scans', {'real': real, 'zebrafish': drawn}, n=3, size=128)


def begin(page, name='Ada'):
    page.get_by_placeholder('your name').fill(name)
    page.keyboard.press('Tab')
    page.get_by_role('button', name='Begin or go on').click()
    page.locator('img').last.wait_for()


def said(page, study, n, act):
    "Answer, and wait until the page shows the next count; the answers on the disk then"
    page.wait_for_timeout(500)  # as long as a new image takes no answer
    act()
    page.get_by_text(f'{n} of 6 answered').wait_for(timeout=PATIENCE * 1000)
    return list(answers_of(study, 'Ada').values())


def test_a_reader_answers_by_key_and_button_and_goes_on_after_a_reload(browser, study, tmp_path):
    log = tmp_path / 'log'
    command = medsketch('study', str(study.folder), '--port', '0', '--no-browser')
    with server(command, tmp_path, log) as process:
        page = browser.new_page()
        page.set_default_timeout(120_000)  # a kernel starts meanwhile, slowly on a busy machine
        errors = []
        page.on('pageerror', lambda e: errors.append(e))
        page.goto(read_url(process, log))
        page.get_by_placeholder('your name').fill('r s')  # keys in a name answer nothing
        begin(page)
        assert said(page, study, 1, lambda: page.keyboard.press('r')) == ['real']
        assert said(page, study, 2, lambda: page.keyboard.press('S')) == ['real', 'synthetic']
        press = page.get_by_role('button', name='synthetic (s)').click
        assert said(page, study, 3, press) == ['real', 'synthetic', 'synthetic']
        page.keyboard.press('x')
        assert page.locator('img').last.get_attribute('src').startswith('blob:')  # no name of a file
        assert 'zebrafish' not in page.content() and study.folder.name not in page.inner_text('body')
        page.screenshot(path=OUT / 'study.png')
        page.reload()
        begin(page)
        page.get_by_text('3 of 6 answered').wait_for()
        assert said(page, study, 4, lambda: page.keyboard.press('s'))[3:] == ['synthetic']
        assert not errors, errors
        page.close()
