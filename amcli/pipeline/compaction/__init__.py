"""From a context to a compact one: plan, budgets, fits, errors."""
