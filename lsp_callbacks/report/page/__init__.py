"""One page of HTML for logged runs, which needs neither server nor network."""
