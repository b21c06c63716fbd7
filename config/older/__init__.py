"""The names of older systems: what each of their settings is called here, or why it is not here."""
