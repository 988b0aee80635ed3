"""What an edit costs on paper: memory, arithmetic, and a lower bound of a step's time."""
