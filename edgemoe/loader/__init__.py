"""From the store's file into budgeted memory."""
