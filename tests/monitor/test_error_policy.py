"""One warning for each kind of failure, whatever its numbers are; exceptions where the policy is strict."""

import warnings

import pytest

from lsp_callbacks.monitor.error_policy import ErrorPolicy


def warned(act):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        act()
    return [str(w.message) for w in caught]


def test_one_warning_for_each_kind():
    policy = ErrorPolicy(strict=False)
    texts = ["step 3 is late", "step 4 is late", "another"]
    assert warned(lambda: [policy.warn_once(text) for text in texts]) == [
        "lsp_callbacks: step 3 is late", "lsp_callbacks: another",
    ]  # fmt: skip
    policy.reset()
    assert len(warned(lambda: policy.warn_once("step 5 is late"))) == 1


def test_failures_of_a_kind_share_a_warning():
    policy = ErrorPolicy(strict=False)
    failures = {"a": "ValueError: no 1", "b": "ValueError: no 2", "c": "KeyError: x"}
    texts = warned(lambda: policy.report(failures, 7, warn=True))
    assert texts[0].startswith("lsp_callbacks could not measure a, b at step 7; reporting NaN: ValueError: no 1")
    assert len(texts) == 2 and not warned(lambda: policy.report(failures, 8, warn=True))


def test_a_strict_policy_raises():
    with pytest.raises(KeyError), ErrorPolicy(strict=True).warn_instead_of_raise("it failed"):
        raise KeyError("x")

    def act():
        with ErrorPolicy(strict=False).warn_instead_of_raise("it failed"):
            raise KeyError("x")

    assert warned(act) == ["lsp_callbacks: it failed: KeyError: 'x'"]
