"""Problems that are small enough to be solved exactly, and what the production losses and loops make of them."""
