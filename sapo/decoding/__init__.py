"""The engine: how completions are laid out, sampled, scored and searched."""
