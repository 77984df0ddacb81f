// Stands in for an npm package that backtest-kit asks for and the registry does not hold: it makes the logger one and
// the same everywhere, and has no part in writing.
"use strict";
exports.singleton = (Class) => {
  let only;
  return new Proxy(Class, { construct: (target, words) => (only ??= Reflect.construct(target, words)) });
};
