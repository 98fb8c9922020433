"""The corpus: docstrings are found without importing, nothing repeats, nothing held out leaks."""

import pytest

from flexq_core.sources import corpus, demo

LONG = "This sentence is long enough to be counted as one that must never be seen in training at all."


def test_docstrings_and_long_arguments_are_found_without_importing(tmp_path):
    file = tmp_path / "module.py"
    file.write_text(
        '"""Module text."""\nraise SystemExit("imported!")\n'
        'class A:\n    """Class text."""\n    def f(self):\n        """Method text."""\n'
        f'add_docstr(f, """\n    {"Argument text. " * 20}\n    """)\nshort("no")\n'
    )
    found = list(corpus.file_docstrings(file))
    assert set(found) >= {"Module text.", "Class text.", "Method text."}
    assert any(text.startswith("Argument text.") for text in found)
    assert "no" not in found


def test_a_file_that_is_not_python_gives_nothing(tmp_path):
    file = tmp_path / "template.py"
    file.write_text("{% for x in y %}\n")
    assert list(corpus.file_docstrings(file)) == []


def test_repeated_and_banned_paragraphs_are_dropped(monkeypatch):
    docstrings = [
        "A first paragraph about quantisation of weights.\n\nA second paragraph about activations, in groups.",
        "A second  paragraph about ACTIVATIONS, in groups.\n\nA third paragraph, which is new and is kept.",
        f"A fourth paragraph. {LONG}",
        "A fifth paragraph that the held-out text holds too.",
    ]
    monkeypatch.setattr(corpus, "package_docstrings", lambda package: docstrings)
    held_out = f"Something else.\n\nA fifth paragraph that the\nheld-out text holds too.\n\nAnother. {LONG} More."
    kept = corpus.documents(["any"], without=[held_out])
    assert kept == [docstrings[0], "A third paragraph, which is new and is kept."]


def test_nothing_of_the_held_out_text_is_in_a_real_package():
    held_out = demo.held_out_text().text
    topics = {corpus.fingerprint(paragraph) for paragraph in corpus.paragraphs(held_out)}
    assert len(topics) > 1000
    for document in corpus.documents(["joblib", "PIL"], without=[held_out]):
        assert not topics & {corpus.fingerprint(paragraph) for paragraph in corpus.paragraphs(document)}


def test_packages_are_held_out_and_an_absent_one_is_an_error():
    assert not set(corpus.TRAINING_PACKAGES) & set(corpus.HELD_OUT_PACKAGES)
    with pytest.raises(ModuleNotFoundError):
        list(corpus.package_docstrings("no_such_package"))
