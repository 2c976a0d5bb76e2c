"""Who bought what: catalogues, user sequences, and a synthetic world with a known optimum."""
