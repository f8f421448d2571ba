-- The timetable of one source in Redis: the same steps as src/quota/timetable.rs, one call per lease.
--
-- KEYS[1]  weir:quota:{<source>}; all other keys begin with it, so that a cluster keeps them together
-- ARGV[1]  what to do: configure | lease | hold | holds | remember
-- ARGV[2]  the server's run id as this connection learned it: another one in the state = restart or failover
-- ARGV[3]  its arguments, as JSON
--
-- :meta     what concerns the whole source (MessagePack)
-- :account  name -> MessagePack {gate, address, held, disabled}
-- :queue:A  names of the accounts of address A by the time at which they may call next; disabled ones at +inf
-- :returned slots that came back, "time:number:name", by time
--
-- Times are microseconds since 1970 by this server's clock. They are written with %.0f, since Lua's own way
-- keeps 14 digits of 16.

local floor, max, min = math.floor, math.max, math.min
local INFINITE = 9e15
local META, ACCOUNT, RETURNED = KEYS[1] .. ':meta', KEYS[1] .. ':account', KEYS[1] .. ':returned'
local function queue(address) return KEYS[1] .. ':queue:' .. address end

local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000000 + tonumber(time[2])
local run, input = ARGV[2], cjson.decode(ARGV[3])

local function digits(at)
  if at >= INFINITE then return '+inf' end
  return string.format('%.0f', at)
end

-- ---------------------------------------------------------------- budgets (budget.rs)

local function index_of(budget, at) return floor((max(at, 0) + budget.shift) / budget.width) end

local function touched(budget, at)
  return index_of(budget, at - budget.before), index_of(budget, at + budget.after)
end

-- If the buckets that end with this one are full: the first one for which enough of them are forgotten.
local function full_until(budget, index)
  local spent, used, til = budget.spent, 0, nil
  for i = 1, #spent, 2 do
    if spent[i] + budget.span > index then used = used + spent[i + 1] end
  end
  for i = 1, #spent, 2 do
    if spent[i] + budget.span > index then
      if used < budget.calls then break end
      used = used - spent[i + 1]
      til = spent[i] + budget.span
    end
  end
  return til
end

local function budget_free_at(budget, at)
  while true do
    local first, last = touched(budget, at)
    local til
    for index = first, last do
      til = full_until(budget, index)
      if til then break end
    end
    if not til then return at end
    at = til * budget.width - budget.shift + budget.before
  end
end

local function add(budget, index, calls)
  local spent = budget.spent
  local place = #spent + 1
  while place > 1 and spent[place - 2] > index do place = place - 2 end
  if place > 1 and spent[place - 2] == index then
    spent[place - 1] = spent[place - 1] + calls
  else
    table.insert(spent, place, index)
    table.insert(spent, place + 1, calls)
  end
end

local function charge(budget, at)
  local first, last = touched(budget, at)
  for index = first, last do add(budget, index, 1) end
  local spent = budget.spent
  while #spent > 0 and spent[1] + budget.span <= first do
    table.remove(spent, 1)
    table.remove(spent, 1)
  end
end

local function refund(budget, at)
  local first, last = touched(budget, at)
  local spent = budget.spent
  for i = #spent - 1, 1, -2 do
    if spent[i] >= first and spent[i] <= last then
      spent[i + 1] = spent[i + 1] - 1
      if spent[i + 1] <= 0 then
        table.remove(spent, i)
        table.remove(spent, i)
      end
    end
  end
end

-- ---------------------------------------------------------------- gates

local function gate_free_at(gate, at)
  at = max(at, gate.next)
  while true do
    local later = at
    for _, budget in ipairs(gate.budgets) do later = budget_free_at(budget, later) end
    if later == at then return at end
    at = later
  end
end

local function gate_take(gate, at)
  -- At least a microsecond, so that accounts without a limit take turns.
  gate.next = at + max(gate.spacing, 1)
  for _, budget in ipairs(gate.budgets) do charge(budget, at) end
end

local function gate_refund(gate, at)
  for _, budget in ipairs(gate.budgets) do refund(budget, at) end
end

-- What may have happened that this state does not know: slots up to `horizon` (all that is leased), and calls
-- since `since` as fast as the gate lets them. Without `since` the past is unknown altogether.
local function gate_doubt(gate, horizon, phase, since, known)
  gate.next = max(gate.next, horizon + gate.spacing + phase)
  for _, budget in ipairs(gate.budgets) do
    local calls = 0
    if since then
      calls = gate.spacing > 0 and min(budget.calls, floor((horizon - since) / gate.spacing) + 1) or budget.calls
    elseif budget.learns or known then
      calls = budget.calls
    end
    if calls > 0 then
      local first, last = touched(budget, horizon)
      for index = first, last do add(budget, index, calls) end
    end
  end
end

-- ---------------------------------------------------------------- state

local meta, accounts, changed = nil, {}, {}

local function account(name)
  if accounts[name] == nil then
    local packed = redis.call('HGET', ACCOUNT, name)
    accounts[name] = packed and cmsgpack.unpack(packed) or false
  end
  return accounts[name]
end

-- Calls under way, of all workers; counted only for accounts with a cap.
local function in_flight(state)
  local calls = 0
  for _, count in pairs(state.flying) do calls = calls + count end
  return calls
end

local function count_call(name, worker, by)
  local state = account(name)
  if not state or not state.cap then return end
  state.flying[worker] = max(0, (state.flying[worker] or 0) + by)
  if state.flying[worker] == 0 then state.flying[worker] = nil end
  changed[name] = true
end

local function ready_at(state)
  if state.disabled or (state.cap and in_flight(state) >= state.cap) then return INFINITE end
  return gate_free_at(state.gate, state.held)
end

local function save()
  for name in pairs(changed) do
    local state = accounts[name]
    redis.call('HSET', ACCOUNT, name, cmsgpack.pack(state))
    redis.call('ZADD', queue(state.address), digits(ready_at(state)), name)
  end
  meta.last = max(meta.last, now)
  redis.call('SET', META, cmsgpack.pack(meta))
end

local function doubt_all(since, known)
  local horizon = now + meta.lease
  gate_doubt(meta.source, horizon, 0, since, known)
  for _, gate in ipairs(meta.addresses) do gate_doubt(gate, horizon, 0, since, known) end
  for number, name in ipairs(meta.names) do
    local state = account(name)
    gate_doubt(state.gate, horizon, floor(state.gate.spacing * (number - 1) / #meta.names), since, known)
    changed[name] = true
  end
  meta.next_start = max(meta.next_start, horizon)
  redis.call('DEL', RETURNED)
end

-- Loads what concerns the source; false if there is no whole state.
local function load()
  local worker = input.worker
  local packed = redis.call('GET', META)
  if not packed then return false end
  meta = cmsgpack.unpack(packed)
  -- Redis may have been told to evict keys when memory is short.
  local queued = 0
  for address = 1, #meta.addresses do queued = queued + redis.call('ZCARD', queue(address)) end
  if queued < #meta.names or redis.call('HLEN', ACCOUNT) < #meta.names then return false end
  if meta.run ~= run then
    -- A restart or a failover: this state may be older than the last leases.
    doubt_all(min(meta.last, now), true)
    meta.run = run
  end
  if worker and next(meta.capped) then
    meta.workers[worker] = now
    for other, seen in pairs(meta.workers) do
      -- Its calls have ended, whatever became of it.
      if seen + input.gone < now then
        for name in pairs(meta.capped) do count_call(name, other, -INFINITE) end
        meta.workers[other] = nil
      end
    end
  end
  -- A clock that was set back must not hand out times again; it hands out none until it has caught up.
  if now < meta.last then now = meta.last end
  return true
end

-- ---------------------------------------------------------------- what to do

-- Keeps what is spent of a budget whose rule is still the same.
local function gate_of(rules, old)
  local gate = { spacing = rules.spacing, next = old and old.next or 0, budgets = {} }
  for number, rule in ipairs(rules.budgets) do
    rule.spent = {}
    for _, budget in ipairs(old and old.budgets or {}) do
      if budget.width == rule.width and budget.span == rule.span and budget.shift == rule.shift then
        rule.spent = budget.spent
      end
    end
    gate.budgets[number] = rule
  end
  return gate
end

local function spent_of(gate)
  local lists = {}
  for number, budget in ipairs(gate.budgets) do lists[number] = budget.spent end
  return lists
end

-- What is spent, for a worker to keep in case that this state is lost.
local function remember()
  if not load() then return { 'unknown', now } end
  local memory = { at = digits(now), source = spent_of(meta.source), addresses = {}, accounts = {} }
  for number, gate in ipairs(meta.addresses) do memory.addresses[number] = spent_of(gate) end
  for _, name in ipairs(meta.names) do memory.accounts[name] = spent_of(account(name).gate) end
  return { 'memory', now, cjson.encode(memory) }
end

local function recall(gate, lists)
  for number, budget in ipairs(gate.budgets) do
    if lists and lists[number] then budget.spent = lists[number] end
  end
end

-- Takes over what a worker remembers; since when nothing is known.
local function recall_all(memory)
  recall(meta.source, memory.source)
  for number, gate in ipairs(meta.addresses) do recall(gate, memory.addresses[number]) end
  for name, lists in pairs(memory.accounts) do
    if account(name) then recall(account(name).gate, lists) end
  end
  return min(tonumber(memory.at), now)
end

local function configure()
  local known = load()
  if not known then
    redis.call('DEL', META, ACCOUNT, RETURNED)
    meta = { run = run, birth = now, last = now, next_start = 0, held = 0, disabled = false, seq = 0, addresses = {}, names = {},
      workers = {}, capped = {} }
    accounts = {}
  end
  local plan, old = input.plan, meta
  meta = {
    run = run, birth = old.birth, informed = old.informed or input.known, last = old.last, next_start = old.next_start, held = old.held, disabled = false,
    seq = old.seq + 1, number = old.number or 0, lease = input.lease, interval = plan.interval,
    source = gate_of(plan.source, old.source), addresses = {}, names = {}, workers = old.workers, capped = {},
  }
  for number, rules in ipairs(plan.addresses) do meta.addresses[number] = gate_of(rules, old.addresses[number]) end
  for address = 1, max(#old.addresses, #plan.addresses) do redis.call('DEL', queue(address)) end
  local kept = {}
  for number, one in ipairs(plan.accounts) do
    local before = known and account(one.name) or nil
    accounts[one.name] = {
      gate = gate_of(one.rules, before and before.gate), address = one.address + 1,
      held = before and before.held or 0, disabled = false,
      cap = one.cap > 0 and one.cap or nil, flying = before and before.flying or {},
    }
    if one.cap > 0 then meta.capped[one.name] = true end
    if known and not before then gate_doubt(accounts[one.name].gate, now + meta.lease, 0, nil, false) end
    meta.names[number], kept[one.name], changed[one.name] = one.name, true, true
  end
  for _, name in ipairs(old.names) do
    if not kept[name] then redis.call('HDEL', ACCOUNT, name) end
  end
  -- New state, or state that somebody made who knew nothing of calls that this worker knows of.
  if not known or (input.known and not old.informed) then
    doubt_all(input.memory and recall_all(input.memory) or nil, input.known)
  end
  save()
  return { 'configured', now, digits(meta.birth) }
end

local function free_at(state, at)
  local address = meta.addresses[state.address]
  while true do
    local later = gate_free_at(meta.source, gate_free_at(address, gate_free_at(state.gate, at)))
    if later == at then return at end
    at = later
  end
end

-- The accounts that may be needed for `count` slots: the longest idle, and the first of those that wait.
local function load_candidates(count, earliest)
  local found = {}
  local function take(list, address, is_idle)
    for i = 1, #list, 2 do
      found[#found + 1] = { name = list[i], ready = tonumber(list[i + 1]), address = address, idle = is_idle }
    end
  end
  local limit, border = tostring(count), digits(earliest)
  for address = 1, #meta.addresses do
    local key = queue(address)
    take(redis.call('ZRANGEBYSCORE', key, '-inf', border, 'WITHSCORES', 'LIMIT', '0', limit), address, true)
    take(redis.call('ZRANGEBYSCORE', key, '(' .. border, '(inf', 'WITHSCORES', 'LIMIT', '0', limit), address, false)
  end
  return found
end

-- The account with the earliest slot, and its time.
local function candidate(found, earliest)
  local idle, waiting = {}, {}
  for _, one in ipairs(found) do
    local best = one.idle and idle or waiting
    if not best[one.address] or one.ready < best[one.address].ready then best[one.address] = one end
  end
  local first, first_at
  local function consider(one, at)
    if not one then return end
    at = free_at(account(one.name), at)
    if not first_at or at < first_at then first, first_at = one, at end
  end
  for address = 1, #meta.addresses do
    consider(idle[address], max(earliest, meta.next_start))
    consider(waiting[address], waiting[address] and waiting[address].ready)
  end
  return first, first_at
end

local function is_held(state, at)
  return not state or meta.disabled or state.disabled or at < state.held or at < meta.held
end

local function forget(member, name, at)
  redis.call('ZREM', RETURNED, member)
  local state = account(name)
  if not state then return end
  gate_refund(state.gate, at)
  if meta.addresses[state.address] then gate_refund(meta.addresses[state.address], at) end
  gate_refund(meta.source, at)
  changed[name] = true
end

-- Takes slots back, and forgets those that nobody can use any more.
local function take_back(earliest)
  for i = 1, #input.returned, 2 do
    meta.number = meta.number + 1
    local at, name = input.returned[i], input.returned[i + 1]
    redis.call('ZADD', RETURNED, digits(at), digits(at) .. ':' .. meta.number .. ':' .. name)
    count_call(name, input.worker, -1)
  end
  for _, name in ipairs(input.ended) do count_call(name, input.worker, -1) end
  for _, member in ipairs(redis.call('ZRANGEBYSCORE', RETURNED, '-inf', '(' .. digits(earliest))) do
    local at, name = string.match(member, '^(%d+):%d+:(.*)$')
    forget(member, name, tonumber(at))
  end
end

-- The first slot that came back and that is not held.
local function returned()
  while true do
    local member = redis.call('ZRANGE', RETURNED, 0, 0)[1]
    if not member then return nil end
    local at, name = string.match(member, '^(%d+):%d+:(.*)$')
    at = tonumber(at)
    if not is_held(account(name), at) then return member, name, at end
    forget(member, name, at)
  end
end

local function lease()
  if not load() then return { 'unknown', now } end
  if not meta.informed and input.birth ~= digits(meta.birth) then return { 'unknown', now } end
  local earliest = max(now, meta.held)
  local til = now + min(input.ahead, meta.lease)
  take_back(earliest)
  local slots, next_at = {}, -1
  local found = input.count > 0 and not meta.disabled and load_candidates(input.count, earliest) or {}
  local left = meta.disabled and 0 or input.count
  while left > 0 do
    local one, at = candidate(found, earliest)
    local member, name, back_at = returned()
    if member and (not at or back_at <= at) then
      if back_at > til then next_at = back_at break end
      redis.call('ZREM', RETURNED, member)
      count_call(name, input.worker, 1)
      for _, other in ipairs(found) do
        if other.name == name then other.ready = max(other.ready, ready_at(account(name))) end
      end
      slots[#slots + 1], slots[#slots + 2] = name, back_at
    else
      if not one then break end
      if at > til then next_at = at < INFINITE and at or -1 break end
      local state = account(one.name)
      if one.idle then meta.next_start = at + meta.interval end
      gate_take(state.gate, at)
      gate_take(meta.addresses[state.address], at)
      gate_take(meta.source, at)
      count_call(one.name, input.worker, 1)
      one.ready, one.idle, changed[one.name] = ready_at(state), false, true
      slots[#slots + 1], slots[#slots + 2] = one.name, at
    end
    left = left - 1
  end
  save()
  return { 'slots', now, meta.seq, next_at, slots }
end

local function announce(scope, til)
  meta.seq = meta.seq + 1
  redis.call('PUBLISH', KEYS[1] .. ':hold', cjson.encode({ scope, digits(til) }))
end

-- Moves the shared time of the source (no name) or of an account, for everybody.
local function hold()
  if not load() then return { 'unknown', now } end
  for _, one in ipairs(input.holds) do
    local til = one.disabled and INFINITE or now + one.wait
    if one.released then
      local state = meta
      if one.name then state = account(one.name) end
      if state then
        state.disabled = false
        if one.name then changed[one.name] = true end
        -- Nobody was ever held until then.
        announce(one.name or '', 0)
      end
    elseif not one.name then
      meta.held = one.disabled and meta.held or max(meta.held, til)
      meta.disabled = meta.disabled or one.disabled
      announce('', til)
    elseif account(one.name) then
      local state = account(one.name)
      state.held = one.disabled and state.held or max(state.held, til)
      state.disabled = state.disabled or one.disabled
      changed[one.name] = true
      announce(one.name, til)
    end
  end
  save()
  return { 'held', now }
end

-- All holds that still matter: for whoever has missed their announcement.
local function holds()
  if not load() then return { 'unknown', now } end
  local list = { '', meta.disabled and '+inf' or digits(meta.held) }
  for _, name in ipairs(meta.names) do
    local state = account(name)
    if state.disabled or state.held > now then
      list[#list + 1], list[#list + 2] = name, state.disabled and '+inf' or digits(state.held)
    end
  end
  return { 'holds', now, meta.seq, list }
end

local steps = { configure = configure, lease = lease, hold = hold, holds = holds, remember = remember }
return steps[ARGV[1]]()
