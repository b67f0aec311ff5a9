"""An instance's `/state`: read at a point in time, committed, and put back."""
