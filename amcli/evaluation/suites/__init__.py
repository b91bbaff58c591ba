"""Suites: `register`, `needle`, `ruler`, `qa`, `quality`, `longhealth`, `perplexity`.

Importing this package registers the built-in ones.
"""

from __future__ import annotations

from amcli.evaluation.suites import choice as choice
from amcli.evaluation.suites import needle as needle
from amcli.evaluation.suites import perplexity as perplexity
from amcli.evaluation.suites import qa as qa
from amcli.evaluation.suites import register as register
from amcli.evaluation.suites import ruler as ruler
