"""The page of `timm-dearkd app` in a browser, as a person uses it."""
import os
import shutil
import signal

import pytest
from conftest import run_python, start_python

CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
# Nothing but the page is asked of the network
FLAGS = (
    '--no-sandbox', '--disable-gpu', '--disable-background-networking', '--disable-component-update', '--disable-sync',
    '--no-first-run')


@pytest.fixture()
def playwright():
    pytest.importorskip('gradio')
    if CHROMIUM is None:
        pytest.skip('no chromium, chromium-browser or google-chrome on PATH')
    return pytest.importorskip('playwright.sync_api')


@pytest.fixture()
def student(playwright, train_cli, tmp_path):
    """A student that knows the three colours, and its teacher."""
    args = ('--output', tmp_path, '--epochs', '15', '--lr', '2e-3')
    for name, more in (('cnn', ('--model', 'test_resnet')), ('student', ('--kd-model-name', tmp_path / 'cnn'))):
        result = train_cli(*args, '--experiment', name, *more)
        assert result.returncode == 0, result.stderr
    return tmp_path / 'student'


@pytest.fixture()
def url(student):
    """The address of the page, which Ctrl-C closes without an error."""
    process = start_python('-m', 'timm_dearkd', 'app', student)
    line = process.stdout.readline()
    try:
        assert line.startswith('http://127.0.0.1:'), line + process.communicate(timeout=60)[1]
        yield line.split()[0]
    finally:
        os.killpg(process.pid, signal.SIGINT)
        err = process.communicate(timeout=60)[1]
    assert process.returncode == 0 and 'Traceback' not in err, err


@pytest.mark.integrations
def test_the_page(playwright, url, student, image_folder, tmp_path):
    (tmp_path / 'notes.txt').write_text('no picture')
    requests = []
    with playwright.sync_playwright() as p, p.chromium.launch(executable_path=CHROMIUM, args=FLAGS) as browser:
        page = browser.new_page()
        playwright.expect.set_options(timeout=30_000)
        page.on('request', lambda request: requests.append(request.url))
        page.goto(url)
        drop = page.locator('input[type=file]')
        page.get_by_text('Top-1 on the validation images: teacher ').wait_for()
        for name in ('grass', 'rust', 'blue sky'):  # an image after the other, without a reload
            photo = image_folder / 'validation' / name / '0.png'
            drop.set_input_files(photo)
            for label in ('Student', 'Teacher'):
                block = page.locator('.block', has_text=label).filter(has=page.get_by_test_id('label-output-value'))
                playwright.expect(block.get_by_test_id('label-output-value').first).to_have_text(name)
        result = run_python(
            '-m', 'timm_dearkd', 'predict', photo, '--model', student, '--output', tmp_path / 'predictions')
        assert f'{photo}: blue sky' in result.stdout

        seen, attention = page.locator('img').all()
        before = attention.get_attribute('src')
        seen.click(position={'x': 40, 'y': 60})
        playwright.expect(attention).not_to_have_attribute('src', before)
        before = attention.get_attribute('src')
        page.get_by_label('number input for Layer').fill('4')
        playwright.expect(attention).not_to_have_attribute('src', before)

        drop.set_input_files(tmp_path / 'notes.txt')
        page.get_by_text("'notes.txt' cannot be read as an image").wait_for()
        playwright.expect(page.locator('img')).to_have_count(0)
    assert requests and all(request.startswith((url, 'data:', 'blob:')) for request in requests)
