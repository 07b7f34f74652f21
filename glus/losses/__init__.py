"""Training losses: pure functions, and the objective that weighs them."""
