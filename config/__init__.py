"""Every option, declared once. Imports no MLX, so that ``--help`` is instant."""
