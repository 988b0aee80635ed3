"""The bundled demo model, and its small world of coloured shapes over photographs."""
