from pyfast_dpo.cli import main

raise SystemExit(main())
